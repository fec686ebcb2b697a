"""torchao's QAT: its configurations and fake-quantized modules, thin over `lowp.qat`.

    quantize_(model, QATConfig(base_config, step="prepare"))     nn.Linear -> FakeQuantizedLinear
    ... train ...
    quantize_(model, QATConfig(base_config, step="convert"))     back to nn.Linear, then quantize_ by base_config

The numbers that are trained with are those that `base_config` will store: a fake quantizer that comes from a base configuration
takes scheme and numbers from its row (`config.py`), any configuration of the table but NF4. One that is spelled by itself
(`qat_config.py`) says both. Gradients follow `lowp.ops.fake_quantize`: 1 inside and at half a step
beyond the bounds, 0 where a number was clamped, for float8 too.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MisfitError
from ..numerics import Scheme
from ..qat.fake import Choose, FakeQuantize, as_tokens
from ..qat.learn import LearnedQuantize
from ..quantize import Method
from ..quantize import quantize_ as quantize_by_rules
from . import numbers
from .apply import TENSORS, quantize_, register_quantize_module_handler
from .config import AOBaseConfig, row_of, scheme_of
from .qat_config import (
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    MXFakeQuantizeConfig,
    NVFP4FakeQuantizeConfig,
)
from .tensors import IntxUnpackedToInt8Tensor
from .words import PerToken

# -- fake quantizers --------------------------------------------------------------------------------------------------


class FakeQuantizerBase(nn.Module):
    """Fake-quantizes one tensor, as a configuration says, in whatever dtype it comes.

    Args:
        config: shown as `.config`. spelling, choose: where they are not the configuration's own (a base configuration's row).
    """

    def __init__(
        self, config: Any, spelling: Callable[[torch.dtype], str] | None = None, choose: Choose | None = None
    ) -> None:
        super().__init__()
        self.config, self.enabled = config, True
        if spelling is None and not isinstance(getattr(config, "granularity", None), PerToken):
            choose = choose or config.choose()
        self._spelling, self._choose = spelling or config.spelling, choose
        self._made: dict[torch.dtype, FakeQuantize] = {}
        self.learned: LearnedQuantize | None = None

    @staticmethod
    def from_config(config: FakeQuantizeConfigBase) -> FakeQuantizerBase:
        """The fake quantizer of a configuration."""
        kind = next((made for of, made in _QUANTIZERS.items() if isinstance(config, of)), None)
        if kind is None:
            raise MisfitError(
                f"a fake quantizer wants a configuration such as IntxFakeQuantizeConfig(...), got {config!r:.120}."
            )
        return kind(config)

    def _of(self, dtype: torch.dtype) -> FakeQuantize:
        if self.learned is not None:
            return self.learned
        if dtype not in self._made:
            self._made[dtype] = FakeQuantize(self._spelling(dtype), choose=self._choose)
        return self._made[dtype]

    def learn(self, weight: Tensor) -> None:
        """Let the ranges of a weight be learned, from here on."""
        self.learned = LearnedQuantize(self._spelling(weight.dtype), weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype; x itself where switched off. Activations are seen as tokens."""
        return as_tokens(self._of(x.dtype), x) if self.enabled else x

    def extra_repr(self) -> str:
        """The configuration."""
        return f"{self.config}{'' if self.enabled else ', off'}"


class IntxFakeQuantizer(FakeQuantizerBase):
    """Of an IntxFakeQuantizeConfig."""

    def set_qparams(self, scale: Tensor, zero_point: Tensor, block_size: Any = None) -> None:
        """Give the learned ranges; one number for each block."""
        if self.learned is None:
            raise MisfitError("set_qparams wants range_learning=True, got a fake quantizer whose ranges are measured.")
        with torch.no_grad():
            self.learned.scale.copy_(scale.reshape(self.learned.scale.shape))
            if self.learned.zero_point is not None:
                self.learned.zero_point.copy_(zero_point.reshape(self.learned.zero_point.shape))

    @property
    def scale(self) -> nn.Parameter | None:
        """The learned scales."""
        return None if self.learned is None else self.learned.scale

    @property
    def zero_point(self) -> nn.Parameter | None:
        """The learned zero points."""
        return None if self.learned is None else self.learned.zero_point


class Float8FakeQuantizer(FakeQuantizerBase):
    """Of a Float8FakeQuantizeConfig."""


class Int4WeightFakeQuantizer(FakeQuantizerBase):
    """Of an Int4WeightFakeQuantizeConfig."""

    def forward(self, w: Tensor) -> Tensor:
        """As the others', under torchao's name of the argument."""
        return super().forward(w)


_QUANTIZERS: dict[type, type[FakeQuantizerBase]] = {
    IntxFakeQuantizeConfig: IntxFakeQuantizer,
    Float8FakeQuantizeConfig: Float8FakeQuantizer,
    Int4WeightFakeQuantizeConfig: Int4WeightFakeQuantizer,
    FakeQuantizeConfigBase: FakeQuantizerBase,
}


def _for_weight(config: Any, weight: Tensor) -> FakeQuantizerBase | None:
    """The fake quantizer of a weight: torchao's numbers, learned where the configuration says so."""
    if config is None or isinstance(config, FakeQuantizerBase):
        return config
    made = FakeQuantizerBase.from_config(config)
    if getattr(config, "range_learning", False):
        made.learn(weight)
    return made


def _for_activation(config: Any) -> FakeQuantizerBase | None:
    if config is None or isinstance(config, FakeQuantizerBase):
        return config
    if getattr(config, "range_learning", False):
        raise MisfitError(
            "range_learning is for weights here: lowp.qat.prepare(..., learn='act') learns those of activations."
        )
    made = FakeQuantizerBase.from_config(config)
    made._choose = None  # as the linear layer will quantize what comes in
    return made


# -- modules ----------------------------------------------------------------------------------------------------------


class FakeQuantizedLinear(nn.Linear):
    """A linear layer with fake-quantized weight and, where there is an activation configuration, input."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, activation_config: Any = None,
        weight_config: Any = None, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, *args, **kwargs)
        self.activation_fake_quantizer = _for_activation(activation_config)
        self.weight_fake_quantizer = _for_weight(weight_config, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        x = x if self.activation_fake_quantizer is None else self.activation_fake_quantizer(x)
        weight = self.weight if self.weight_fake_quantizer is None else self.weight_fake_quantizer(self.weight)
        return F.linear(x, weight, self.bias)

    @classmethod
    def from_linear(
        cls, mod: nn.Linear, activation_config: Any = None, weight_config: Any = None
    ) -> FakeQuantizedLinear:
        """The same layer, its parameters shared, with fake quantizers."""
        made = cls(mod.in_features, mod.out_features, mod.bias is not None, device="meta", dtype=mod.weight.dtype)
        made.weight, made.bias = mod.weight, mod.bias
        made.activation_fake_quantizer = _for_activation(activation_config)
        made.weight_fake_quantizer = _for_weight(weight_config, mod.weight)
        return made.train(mod.training)

    def to_linear(self) -> nn.Linear:
        """The same layer without them."""
        made = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        made.weight, made.bias = self.weight, self.bias
        return made.train(self.training)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch both fake quantizers."""
        for fake in (self.activation_fake_quantizer, self.weight_fake_quantizer):
            if fake is not None:
                fake.enabled = enabled

    def disable_fake_quant(self) -> None:
        """Compute in floats."""
        self.enable_fake_quant(False)


class FakeQuantizedEmbedding(nn.Embedding):
    """An embedding whose table is fake-quantized."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False, weight_config: Any = None,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, *args, **kwargs
        )
        self.weight_fake_quantizer = _for_weight(weight_config, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape of ids -> (*ids.shape, K)."""
        weight = self.weight if self.weight_fake_quantizer is None else self.weight_fake_quantizer(self.weight)
        return F.embedding(
            x, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )

    @classmethod
    def from_embedding(cls, mod: nn.Embedding, weight_config: Any = None) -> FakeQuantizedEmbedding:
        """The same table, shared, with a fake quantizer."""
        made = cls(
            mod.num_embeddings, mod.embedding_dim, mod.padding_idx, mod.max_norm, mod.norm_type, mod.scale_grad_by_freq,
            mod.sparse, device="meta", dtype=mod.weight.dtype,
        )  # fmt: skip
        made.weight = mod.weight
        made.weight_fake_quantizer = _for_weight(weight_config, mod.weight)
        return made.train(mod.training)

    def to_embedding(self) -> nn.Embedding:
        """The same table without it."""
        made = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.sparse, device="meta", dtype=self.weight.dtype,
        )  # fmt: skip
        made.weight = self.weight
        return made.train(self.training)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch the fake quantizer."""
        if self.weight_fake_quantizer is not None:
            self.weight_fake_quantizer.enabled = enabled

    def disable_fake_quant(self) -> None:
        """Look up floats."""
        self.enable_fake_quant(False)


class MXFakeQuantizedLinear(FakeQuantizedLinear):
    """FakeQuantizedLinear under the name that torchao has for MX; its bias gets a gradient."""


class NVFP4FakeQuantizedLinear(FakeQuantizedLinear):
    """FakeQuantizedLinear under the name that torchao has for NVFP4; runs on every device, its bias gets a gradient."""


def enable_linear_fake_quant(mod: nn.Module, enabled: bool = True) -> None:
    """Switch a FakeQuantizedLinear; other modules are left alone: for `model.apply`."""
    if isinstance(mod, FakeQuantizedLinear):
        mod.enable_fake_quant(enabled)


def disable_linear_fake_quant(mod: nn.Module) -> None:
    """Let a FakeQuantizedLinear compute in floats: for `model.apply`."""
    enable_linear_fake_quant(mod, False)


def initialize_fake_quantizers(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Run the model once. Learned ranges start from the weights where the model is prepared, so nothing else is needed."""
    with torch.no_grad():
        model(*example_inputs)


# -- QATConfig --------------------------------------------------------------------------------------------------------


class QATStep(str, enum.Enum):
    """Before training, and after."""

    PREPARE = "prepare"
    CONVERT = "convert"


@dataclass
class QATConfig(AOBaseConfig):
    """For `quantize_`: swap layers for fake-quantized ones, and back.

    Args:
        base_config: what the model will be quantized by. activation_config, weight_config: instead of it, for "prepare".
        step: "prepare" or "convert".
    """

    base_config: AOBaseConfig | None = None
    activation_config: FakeQuantizeConfigBase | None = None
    weight_config: FakeQuantizeConfigBase | None = None
    _: dataclasses.KW_ONLY
    step: QATStep | str = "prepare"

    def __post_init__(self) -> None:
        self.step = str(getattr(self.step, "value", self.step)).lower()
        own = self.activation_config is not None or self.weight_config is not None
        if self.step not in ("prepare", "convert"):
            raise MisfitError(f"step is 'prepare' or 'convert', got {self.step!r}.")
        if isinstance(self.base_config, FakeQuantizeConfigBase):
            raise MisfitError(
                f"{type(self.base_config).__name__} is a weight_config or an activation_config, not a base_config."
            )
        if self.base_config is not None and own:
            raise MisfitError("base_config and activation_config or weight_config exclude each other: pass one kind.")
        if self.step == "prepare" and self.base_config is None and not own:
            raise MisfitError("step 'prepare' wants a base_config, or an activation_config or weight_config.")
        if self.step == "convert" and own:
            raise MisfitError("step 'convert' takes only a base_config, got an activation_config or weight_config.")


def _fakes_of(config: QATConfig) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What makes the fake quantizers of weight and activation of a base configuration, by its row."""
    base = config.base_config
    if base is None:
        return lambda: config.weight_config, lambda: config.activation_config
    row = row_of(base)
    if row is None:
        raise MisfitError(
            f"{type(base).__name__} is no configuration of torchao's: give activation_config and weight_config."
        )
    if row.tensor(base) == "NF4Tensor":
        raise MisfitError(
            "QAT does not know how NF4Tensor chooses its numbers: use lowp.qat.prepare with nf4/1x64*int8/1x256."
        )
    run, act = row.numbers(base), Scheme.parse(scheme_of(base)).act

    def weight() -> FakeQuantizerBase:
        kind = _SHOWN.get(row.name, FakeQuantizerBase)
        choose = None if run is numbers.own else run
        return kind(base, lambda dtype: str(Scheme.parse(row.scheme(base, dtype)).weight), choose)

    def activation() -> FakeQuantizerBase | None:
        return None if act is None else _SHOWN.get(row.name, FakeQuantizerBase)(base, lambda dtype: str(act))

    return weight, activation


_SHOWN: dict[str, type[FakeQuantizerBase]] = {
    "Int8DynamicActivationIntxWeightConfig": IntxFakeQuantizer,
    "IntxWeightOnlyConfig": IntxFakeQuantizer,
    "Float8DynamicActivationFloat8WeightConfig": Float8FakeQuantizer,
    "Int4WeightOnlyConfig": Int4WeightFakeQuantizer,
    "Float8DynamicActivationInt4WeightConfig": Int4WeightFakeQuantizer,
}
_SWAPPED = {
    "MXDynamicActivationMXWeightConfig": MXFakeQuantizedLinear,
    "NVFP4DynamicActivationNVFP4WeightConfig": NVFP4FakeQuantizedLinear,
}


@register_quantize_module_handler(QATConfig)
def swapped(module: nn.Module, config: QATConfig) -> nn.Module:
    """What a QATConfig makes of a layer."""
    if config.step == "prepare":
        return _prepared(module, config)
    return _converted(module, config.base_config)


def _prepared(module: nn.Module, config: QATConfig) -> nn.Module:
    weight, activation = _fakes_of(config)
    if isinstance(module, (FakeQuantizedLinear, FakeQuantizedEmbedding)):
        raise MisfitError(f"{type(module).__name__} is prepared already: train it, then quantize_ with step='convert'.")
    act = activation()
    if isinstance(module, nn.Linear):
        kinds: dict[type, type[FakeQuantizedLinear]] = {
            MXFakeQuantizeConfig: MXFakeQuantizedLinear,
            NVFP4FakeQuantizeConfig: NVFP4FakeQuantizedLinear,
        }
        kind = _SWAPPED.get(type(config.base_config).__name__) or kinds.get(
            type(config.weight_config), FakeQuantizedLinear
        )
        return kind.from_linear(module, act, weight())
    if isinstance(module, nn.Embedding):
        if act is not None:
            raise MisfitError(
                "an embedding has no activation to quantize: pass a weight_config alone, or a weight-only base."
            )
        return FakeQuantizedEmbedding.from_embedding(module, weight())
    raise MisfitError(
        f"QAT prepares linear layers and embeddings, got {type(module).__name__}: leave it out of filter_fn."
    )


def _converted(module: nn.Module, base: AOBaseConfig | None) -> nn.Module:
    if isinstance(module, FakeQuantizedLinear):
        plain: nn.Module = module.to_linear()
    elif isinstance(module, FakeQuantizedEmbedding):
        plain = module.to_embedding()
    else:
        return module
    if base is None:
        return plain
    holder, fake = nn.Sequential(plain), module.weight_fake_quantizer
    if isinstance(fake, FakeQuantizerBase) and fake.learned is not None:
        _with_learned(holder, fake.learned, base)
    else:
        quantize_(holder, base, lambda m, name: name == "0")
    return holder[0]


def _with_learned(holder: nn.Sequential, learned: LearnedQuantize, base: AOBaseConfig) -> None:
    """Quantize by ranges that were learned, where the base configuration has the same format."""
    scheme = Scheme.parse(scheme_of(base, holder[0].weight.dtype))  # type: ignore[arg-type]
    if (scheme.weight.element, scheme.weight.block) != (learned.format.element, learned.format.block):
        raise MisfitError(
            f"the ranges were learned for {learned.format}, base_config says {scheme.weight}: give one format."
        )
    spelled = str(learned.format) + (f"@{scheme.act}" if scheme.act else "")
    method = Method(
        name="qat",
        about="learned",
        run=lambda w, statistics, fmt: learned.parts(w),
        why_not=lambda fmt: "",
        takes_any=True,
    )
    quantize_by_rules(holder, {"0": spelled}, method=method)
    row = row_of(base)
    kind = TENSORS[row.tensor(base)] if row is not None else IntxUnpackedToInt8Tensor
    holder[0].weight = nn.Parameter(kind.of_qtensor(holder[0].weight), requires_grad=False)  # type: ignore[arg-type]
