"""torchao's AWQ, SmoothQuant and GPTQ: watch a model run, then quantize it by what was seen. Thin fronts of `lowp.methods`.

    quantize_(model, AWQConfig(base, step="prepare"))     linear layers watch their inputs
    model(calibration data)
    quantize_(model, AWQConfig(base, step="convert"))     our method's numbers, in the scheme of the base configuration

A layer that watches keeps our `Statistics` (sums over tokens), where torchao keeps every input. GPTQ's steps are called
"observe" and "convert" there. Layers are calibrated each by itself, in floats: for the block-by-block way see
`lowp.quantize_(data=...)`.

Unlike torchao's, GPTQ runs on every device, chooses a row's scale from the whole row (there from its first 256 columns), takes
the most important columns first, and does not fail where the Hessian has no factorisation.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MisfitError, SpellingError
from ..methods.awq import awq_factor
from ..methods.gptq import gptq
from ..methods.smoothquant import smooth_factor
from ..numerics import Format, Parts, Scheme
from ..quantize import Method
from ..quantize import quantize_ as quantize_by_rules
from ..quantize.statistics import Statistics
from .apply import TENSORS, register_quantize_module_handler, show, with_static
from .config import AOBaseConfig, row_of
from .spelling import one_spelling


class ObservedLinear(nn.Linear):
    """A linear layer that watches its inputs; its weight and bias are those of the layer it replaces."""

    statistics: Statistics

    @classmethod
    def of(cls, linear: nn.Linear) -> ObservedLinear:
        """The layer that watches in place of another."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        made.statistics = Statistics.empty(linear.in_features, device=linear.weight.device)
        return made

    def forward(self, input: Tensor) -> Tensor:
        self.statistics.update(input)
        return F.linear(input, self.weight, self.bias)


class AWQObservedLinear(ObservedLinear):
    """A layer that watches for AWQ."""


class SmoothQuantObservedLinear(ObservedLinear):
    """A layer that watches for SmoothQuant."""


class GPTQObservedLinear(ObservedLinear):
    """A layer that watches for GPTQ."""


@dataclass
class AWQConfig(AOBaseConfig):
    """AWQ over a configuration of weights (int4, int8).

    Args:
        base_config: what the weights become. step: "prepare", "convert" or "prepare_for_loading".
        scale_search_space_size: the grid has 20 values, torchao's default; another number warns.
    """

    base_config: AOBaseConfig | None = None
    step: Any = "prepare"
    scale_search_space_size: int = 20

    def __post_init__(self) -> None:
        if self.scale_search_space_size != 20:
            warnings.warn(
                f"AWQConfig searches among 20 factors, not among scale_search_space_size={self.scale_search_space_size}.",
                stacklevel=3,
            )
        self.step = _step(self.step, ("prepare", "convert", "prepare_for_loading"))


@dataclass
class SmoothQuantConfig(AOBaseConfig):
    """SmoothQuant over a configuration of weights and activations (int8).

    Args:
        base_config: what the layers become. step: "prepare", "convert" or "prepare_for_loading".
        alpha: 0 leaves the activations' range, 1 evens it out. use_running_absmax: kept; the range is always that of all inputs.
    """

    base_config: AOBaseConfig | None = None
    step: Any = "prepare"
    alpha: float = 0.5
    use_running_absmax: bool = False

    def __post_init__(self) -> None:
        self.step = _step(self.step, ("prepare", "convert", "prepare_for_loading"))


@dataclass
class GPTQConfig(AOBaseConfig):
    """GPTQ over a configuration of weights.

    Args:
        step: "observe" or "convert". base_config: what the weights become. percdamp: damping, of the mean of H's diagonal.
        gptq_quantize_block_size: kept; it changes the speed there, not the numbers.
    """

    step: Any = "observe"
    base_config: AOBaseConfig | None = None
    percdamp: float = 0.01
    gptq_quantize_block_size: int = field(default=256)

    def __post_init__(self) -> None:
        self.step = _step(self.step, ("observe", "convert"))


def _step(step: Any, known: tuple[str, ...]) -> str:
    name = str(getattr(step, "value", step)).lower()
    if name not in known:
        raise SpellingError.of("step", name, known)
    return name


def gptq_quantize(H: Tensor, W_t: Tensor, config: GPTQConfig) -> Tensor:
    """GPTQ of a weight (N, K) by a Hessian (K, K), as the class of the base configuration."""
    seen = Statistics.empty(W_t.shape[-1], device=W_t.device)
    seen.hessian_KK, seen.tokens = H.to(torch.float32), 1
    linear = nn.Linear(W_t.shape[1], W_t.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(W_t.detach(), requires_grad=False)
    return _converted(linear, config.base_config, _by_gptq(seen, config)).weight


@register_quantize_module_handler(GPTQConfig)
def _gptq(module: nn.Module, config: GPTQConfig) -> nn.Module:
    if config.step == "observe":
        return GPTQObservedLinear.of(_linear(module))
    seen = _watched(module, "GPTQConfig(step='observe')").statistics
    return _converted(module, _with_scale(config.base_config, seen), _by_gptq(seen, config))


def _by_gptq(seen: Statistics, config: GPTQConfig) -> Callable[[Tensor, Format], Parts]:
    return lambda weight, fmt: gptq(weight, seen, fmt, damp=config.percdamp)


@register_quantize_module_handler(AWQConfig)
def _awq(module: nn.Module, config: AWQConfig) -> nn.Module:
    return _smoothed(module, config, AWQObservedLinear, awq_factor)


@register_quantize_module_handler(SmoothQuantConfig)
def _smoothquant(module: nn.Module, config: SmoothQuantConfig) -> nn.Module:
    def factor(weights: list[Tensor], seen: Statistics, schemes: list[Scheme]) -> Tensor | None:
        return smooth_factor(weights, seen, schemes, alpha=config.alpha)

    return _smoothed(module, config, SmoothQuantObservedLinear, factor)


def _smoothed(module: nn.Module, config: Any, kind: type[ObservedLinear], choose: Callable[..., Any]) -> nn.Module:
    """Prepare, or divide the weight's columns by the factor that is chosen and keep it as act_pre_scale."""
    if config.step == "prepare":
        return kind.of(_linear(module))
    base, weight = config.base_config, module.weight
    assert isinstance(weight, Tensor)
    if config.step == "prepare_for_loading":  # the place for what a checkpoint brings, act_pre_scale with it
        return _converted(module, _with_scale(base, None), None, torch.ones(weight.shape[1], device=weight.device))
    seen = _watched(module, f"{type(config).__name__}(step='prepare')").statistics
    scheme = Scheme.parse(_spelling(base, weight))
    factor = choose([weight.detach().to(torch.float32)], seen, [scheme]) if seen.tokens else None
    if factor is None:
        return _converted(module, _with_scale(base, seen), None)
    factor = factor.to(weight.dtype).to(torch.float32)
    return _converted(module, _with_scale(base, seen.scaled(factor)), None, factor)


def _with_scale(base: Any, seen: Statistics | None) -> Any:
    """A configuration that wants a static scale of the activations, with that of the largest that was seen; others as they are.

    torchao's symmetric int8: amax / 127.5, for 7 bits amax / 63.5. None: a place for what a checkpoint brings.
    """
    if getattr(base, "act_quant_scale", base) is not None:
        return base
    if seen is None:
        return dataclasses.replace(base, act_quant_scale=torch.ones(1))
    if not seen.tokens:
        raise MisfitError(
            f"{type(base).__name__} wants a scale of the activations, and the layer saw none: run the model on data."
        )
    half = 63.5 if base.reduce_range else 127.5
    scale = (seen.amax_K.max() / half).clamp(min=torch.finfo(torch.float32).eps)
    return dataclasses.replace(base, act_quant_scale=scale)


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise MisfitError(
            f"calibration wants linear layers, got {type(module).__name__}: pass a filter_fn that takes no others."
        )
    return module


def _watched(module: nn.Module, step: str) -> ObservedLinear:
    if not isinstance(module, ObservedLinear):
        raise MisfitError(f"step 'convert' wants layers that have watched, got {type(module).__name__}: {step} first.")
    return module


def _spelling(base: AOBaseConfig | None, weight: Tensor) -> str:
    row = None if base is None else row_of(base)
    if row is None:
        raise MisfitError(
            f"base_config wants a configuration such as Int8WeightOnlyConfig(), got {type(base).__name__}."
        )
    return one_spelling(row.scheme(base, weight.dtype), tuple(weight.shape))


def _converted(
    module: nn.Module,
    base: AOBaseConfig | None,
    run: Callable[[Tensor, Format], Parts] | None,
    factor_K: Tensor | None = None,
) -> nn.Linear:
    """A linear layer with the weight quantized, by `run` or by the base configuration's own numbers."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    spelling, row = _spelling(base, weight), row_of(base)
    assert row is not None
    numbers = with_static(run or row.numbers(base), base)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    scaled = weight.detach() if factor_K is None else weight.detach().to(torch.float32) / factor_K
    made.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
    made.bias = bias if isinstance(bias, nn.Parameter) else None
    holder = nn.Sequential(made)
    own = Method(
        name=f"torchao's {row.name}, calibrated",
        about="",
        run=lambda w, statistics, fmt: numbers(w, fmt),
        why_not=lambda fmt: "",
    )
    report = quantize_by_rules(holder, {"0": spelling}, method=own)
    if factor_K is not None:
        packed = made.weight.to_layout("plain")  # type: ignore[operator]
        layout = made.weight.spec.layout  # type: ignore[union-attr]
        kept = packed.like(packed.packed | {"act_pre_scale": factor_K.to(weight.dtype)}).to_layout(layout)
        made.weight = nn.Parameter(kept, requires_grad=False)
    show(holder, report, TENSORS[row.tensor(base)])
    return made
