"""torchao's older ways into QAT: objects that prepare and convert a model, and configurations before QATConfig.

    quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32)
    model = quantizer.prepare(model)      ... train ...      model = quantizer.convert(model)

What `convert` makes are nn.Linear and nn.Embedding with quantized weights, as everywhere in lowp, not modules of torchao's first
kind. A layer whose columns the group does not divide stays in floats, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import MisfitError
from .apply import is_linear, quantize_, register_quantize_module_handler, replace_modules
from .config import CONFIGS, AOBaseConfig
from .qat import FakeQuantizedEmbedding, FakeQuantizedLinear, QATConfig, swapped
from .qat_config import (
    FakeQuantizeConfigBase,
    Float8FakeQuantizeConfig,
    Int4WeightFakeQuantizeConfig,
    IntxFakeQuantizeConfig,
)
from .words import Int4PackingFormat, MappingType, PerGroup, ZeroPointDomain

Filter = Callable[[nn.Module, str], bool]


class TwoStepQuantizer:
    """Prepare, train, convert; both answer the model."""

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model with fake-quantized layers, in place."""
        raise NotImplementedError(f"{type(self).__name__} wants a prepare method.")

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model with quantized weights, in place."""
        raise NotImplementedError(f"{type(self).__name__} wants a convert method.")


class ComposableQATQuantizer(TwoStepQuantizer):
    """Several quantizers, one after the other: one for linear layers, one for embeddings, say."""

    def __init__(self, quantizers: Sequence[TwoStepQuantizer]) -> None:
        self.quantizers = list(quantizers)

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Each prepares."""
        for quantizer in self.quantizers:
            model = quantizer.prepare(model)
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Each converts."""
        for quantizer in self.quantizers:
            model = quantizer.convert(model)
        return model


class _Swapping(TwoStepQuantizer):
    """A quantizer that is one way to swap layers: `weight`, `activation`, `base` and the class it makes."""

    made: type[nn.Module] = FakeQuantizedLinear
    weight: FakeQuantizeConfigBase
    activation: FakeQuantizeConfigBase | None = None
    base: AOBaseConfig
    groupsize: int

    def _fits(self, module: nn.Module, name: str) -> bool:
        right = isinstance(module, nn.Embedding) if issubclass(self.made, nn.Embedding) else is_linear(module)
        return right and not isinstance(module, self.made) and module.weight.shape[-1] % self.groupsize == 0  # type: ignore[index,union-attr]

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model with fake-quantized layers, in place."""

        def swap(module: Any) -> nn.Module:
            if issubclass(self.made, FakeQuantizedEmbedding):
                return self.made.from_embedding(module, self.weight)
            return self.made.from_linear(module, self.activation, self.weight)  # type: ignore[attr-defined,no-any-return]

        return replace_modules(model, swap, self._fits)

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model with quantized weights, in place."""
        config = QATConfig(self.base, step="convert")
        holder = nn.Sequential(model)
        quantize_(holder, config, lambda module, name: isinstance(module, self.made))
        return holder[0]

    def get_activation_fake_quantize_config(self) -> FakeQuantizeConfigBase | None:
        """Of what comes in."""
        return self.activation

    def get_weight_fake_quantize_config(self) -> FakeQuantizeConfigBase | None:
        """Of the weights."""
        return self.weight


class Int8DynActInt4WeightQATLinear(FakeQuantizedLinear):
    """int4 weights by groups, int8 activations by tokens."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, device: Any = None, groupsize: int = 256,
        precision: torch.dtype = torch.float32, scales_precision: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        act, weight = _da8w4(groupsize, scales_precision)
        super().__init__(in_features, out_features, bias, act, weight, device=device, dtype=precision)


class Int4WeightOnlyQATLinear(FakeQuantizedLinear):
    """int4 weights by groups, as tinygemm chooses them."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, device: Any = None, groupsize: int = 256,
        inner_k_tiles: int = 8, precision: torch.dtype = torch.bfloat16, scales_precision: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        weight = _tinygemm(groupsize, scales_precision)
        super().__init__(in_features, out_features, bias, None, weight, device=device, dtype=precision)


class Int4WeightOnlyQATEmbedding(FakeQuantizedEmbedding):
    """int4 rows by groups."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, group_size: int = 32,
        scale_precision: torch.dtype = torch.float32, zero_point_precision: torch.dtype = torch.int32, *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        config = IntxFakeQuantizeConfig(torch.int4, group_size=group_size, scale_precision=scale_precision)
        super().__init__(num_embeddings, embedding_dim, *args, weight_config=config, **kwargs)


def _da8w4(groupsize: int, scales: torch.dtype) -> tuple[IntxFakeQuantizeConfig, IntxFakeQuantizeConfig]:
    return (
        IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        IntxFakeQuantizeConfig(torch.int4, group_size=groupsize, scale_precision=scales),
    )


def _tinygemm(groupsize: int, scales: torch.dtype) -> IntxFakeQuantizeConfig:
    return IntxFakeQuantizeConfig(
        torch.int4, group_size=groupsize, is_symmetric=False, scale_precision=scales, zero_point_precision=scales,
        zero_point_domain=ZeroPointDomain.FLOAT,
    )  # fmt: skip


def _made_as(kind: type[nn.Module], parent: type[Any]) -> type[Any]:
    """torchao's older class name for layers that `from_linear` makes without its constructor's arguments."""

    def from_float(cls: Any, mod: Any, *configs: Any) -> nn.Module:
        made = getattr(parent, "from_embedding" if issubclass(parent, nn.Embedding) else "from_linear")(mod, *configs)
        made.__class__ = cls
        return made  # type: ignore[no-any-return]

    name = "from_embedding" if issubclass(parent, nn.Embedding) else "from_linear"
    setattr(kind, name, classmethod(from_float))
    return kind


for _kind in (Int8DynActInt4WeightQATLinear, Int4WeightOnlyQATLinear):
    _made_as(_kind, FakeQuantizedLinear)
_made_as(Int4WeightOnlyQATEmbedding, FakeQuantizedEmbedding)


class Int8DynActInt4WeightQATQuantizer(_Swapping):
    """int4 weights by groups, int8 activations by tokens."""

    made = Int8DynActInt4WeightQATLinear

    def __init__(
        self, groupsize: int = 256, padding_allowed: bool = False, precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.groupsize = groupsize
        self.activation, self.weight = _da8w4(groupsize, scales_precision)
        self.base = CONFIGS["Int8DynamicActivationIntxWeightConfig"](  # type: ignore[call-arg]
            weight_dtype=torch.int4, weight_granularity=PerGroup(groupsize), weight_scale_dtype=scales_precision,
            act_mapping_type=MappingType.ASYMMETRIC,
        )  # fmt: skip


class Int4WeightOnlyQATQuantizer(_Swapping):
    """int4 weights by groups, as tinygemm chooses them."""

    made = Int4WeightOnlyQATLinear

    def __init__(
        self, groupsize: int = 256, inner_k_tiles: int = 8, precision: torch.dtype = torch.bfloat16,
        scales_precision: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.groupsize = groupsize
        self.weight = _tinygemm(groupsize, scales_precision)
        self.base = CONFIGS["Int4WeightOnlyConfig"](  # type: ignore[call-arg]
            group_size=groupsize, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D
        )


class Int4WeightOnlyEmbeddingQATQuantizer(_Swapping):
    """int4 rows of embeddings by groups."""

    made = Int4WeightOnlyQATEmbedding

    def __init__(
        self, group_size: int = 256, scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
    ) -> None:  # fmt: skip
        self.groupsize = group_size
        self.weight = IntxFakeQuantizeConfig(torch.int4, group_size=group_size, scale_precision=scale_precision)
        self.base = CONFIGS["IntxWeightOnlyConfig"](  # type: ignore[call-arg]
            weight_dtype=torch.int4, granularity=PerGroup(group_size), scale_dtype=scale_precision
        )


class Float8ActInt4WeightQATQuantizer(_Swapping):
    """int4 weights by groups of 128, float8 activations by tokens."""

    def __init__(self, group_size: int | None = 64, scale_precision: torch.dtype = torch.bfloat16) -> None:
        self.groupsize = 128
        if group_size not in (None, 64, 128):
            raise MisfitError(f"float8 activations with int4 weights want groups of 128, got {group_size}.")
        self.activation = Float8FakeQuantizeConfig()
        self.weight = Int4WeightFakeQuantizeConfig(group_size=128)
        self.base = CONFIGS["Float8DynamicActivationInt4WeightConfig"]()


# -- switches for `model.apply` ---------------------------------------------------------------------------------------


def _switch(kind: type[FakeQuantizedLinear], enabled: bool, about: str) -> Callable[[nn.Module], None]:
    def switch(mod: nn.Module) -> None:
        if isinstance(mod, kind):
            mod.enable_fake_quant(enabled)

    switch.__doc__ = about
    return switch


enable_4w_fake_quant = _switch(
    Int4WeightOnlyQATLinear, True, "Switch fake quantization on, where it is int4 weights only."
)
disable_4w_fake_quant = _switch(Int4WeightOnlyQATLinear, False, "Switch it off there.")
enable_8da4w_fake_quant = _switch(
    Int8DynActInt4WeightQATLinear, True, "The same for int8 activations and int4 weights."
)
disable_8da4w_fake_quant = _switch(Int8DynActInt4WeightQATLinear, False, "Switch it off there.")


# -- configurations before QATConfig ----------------------------------------------------------------------------------


@dataclass
class IntXQuantizationAwareTrainingConfig(AOBaseConfig):
    """QATConfig(step="prepare") before it had its name."""

    activation_config: FakeQuantizeConfigBase | None = None
    weight_config: FakeQuantizeConfigBase | None = None


@dataclass
class FromIntXQuantizationAwareTrainingConfig(AOBaseConfig):
    """QATConfig(step="convert") without a base: fake-quantized layers become what they were."""


@register_quantize_module_handler(IntXQuantizationAwareTrainingConfig)
def _prepare(module: nn.Module, config: IntXQuantizationAwareTrainingConfig) -> nn.Module:
    return swapped(module, QATConfig(activation_config=config.activation_config, weight_config=config.weight_config))


@register_quantize_module_handler(FromIntXQuantizationAwareTrainingConfig)
def _from(module: nn.Module, config: FromIntXQuantizationAwareTrainingConfig) -> nn.Module:
    return swapped(module, QATConfig(step="convert"))
