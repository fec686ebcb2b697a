"""Names that torchao had once and programs still spell: functions for configurations, layouts, quantizers.

A layout said where bytes lie. Ours are picked for the device, so these carry their fields and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .apply import is_linear, quantize_
from .config import CONFIGS, AOBaseConfig
from .views import View
from .words import Int4ChooseQParamsAlgorithm, Int4PackingFormat, MappingType

_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Layout:
    """Where bytes lie in torchao; the base of the others."""


@dataclass(frozen=True)
class PlainLayout(Layout):
    """Bytes in their order."""


@dataclass(frozen=True)
class TensorCoreTiledLayout(Layout):
    """tinygemm's tiles."""

    inner_k_tiles: int = 8


@dataclass(frozen=True)
class Int4CPULayout(Layout):
    """torch's order for int4 on CPUs."""


@dataclass(frozen=True)
class QDQLayout(Layout):
    """Codes beside their scales, one to a byte."""


def int4_weight_only(
    group_size: int = 128, layout: Any = None, use_hqq: bool = False, zero_point_domain: Any = None, **more: Any
) -> AOBaseConfig:
    """Int4WeightOnlyConfig; with `use_hqq` its scales are chosen by HQQ."""
    how = Int4ChooseQParamsAlgorithm.HQQ if use_hqq else Int4ChooseQParamsAlgorithm.TINYGEMM
    return CONFIGS["Int4WeightOnlyConfig"](
        group_size=group_size,
        int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
        int4_choose_qparams_algorithm=how,
    )


def int8_weight_only(group_size: int | None = None, **more: Any) -> AOBaseConfig:
    """Int8WeightOnlyConfig."""
    return CONFIGS["Int8WeightOnlyConfig"](group_size=group_size)


def int8_dynamic_activation_int8_weight(
    layout: Any = None,
    act_mapping_type: MappingType = MappingType.SYMMETRIC,
    weight_only_decode: bool = False,
    **more: Any,
) -> AOBaseConfig:
    """Int8DynamicActivationInt8WeightConfig."""
    return CONFIGS["Int8DynamicActivationInt8WeightConfig"](act_mapping_type, weight_only_decode)


def int8_dynamic_activation_int4_weight(
    group_size: int = 32,
    layout: Any = None,
    mapping_type: MappingType = MappingType.SYMMETRIC,
    act_mapping_type: MappingType = MappingType.ASYMMETRIC,
    **more: Any,
) -> AOBaseConfig:
    """Int8DynamicActivationInt4WeightConfig."""
    return CONFIGS["Int8DynamicActivationInt4WeightConfig"](
        group_size, act_mapping_type=act_mapping_type, mapping_type=mapping_type
    )


def float8_weight_only(weight_dtype: torch.dtype = _E4M3, **more: Any) -> AOBaseConfig:
    """Float8WeightOnlyConfig."""
    return CONFIGS["Float8WeightOnlyConfig"](weight_dtype)


def float8_dynamic_activation_float8_weight(
    activation_dtype: torch.dtype = _E4M3,
    weight_dtype: torch.dtype = _E4M3,
    granularity: Any = None,
    mm_config: Any = None,
    **more: Any,
) -> AOBaseConfig:
    """Float8DynamicActivationFloat8WeightConfig."""
    return CONFIGS["Float8DynamicActivationFloat8WeightConfig"](
        activation_dtype, weight_dtype, granularity, mm_config=mm_config
    )


def uintx_weight_only(dtype: torch.dtype, group_size: int = 64, **more: Any) -> AOBaseConfig:
    """UIntxWeightOnlyConfig, by the dtype."""
    return CONFIGS["UIntxWeightOnlyConfig"](group_size, int(str(dtype).rpartition("uint")[2]))


def gemlite_uintx_weight_only(group_size: int | None = 128, bit_width: int = 4, **more: Any) -> AOBaseConfig:
    """UIntxWeightOnlyConfig."""
    return CONFIGS["UIntxWeightOnlyConfig"](group_size, bit_width)


def fpx_weight_only(ebits: int, mbits: int) -> AOBaseConfig:
    """FPXWeightOnlyConfig."""
    return CONFIGS["FPXWeightOnlyConfig"](ebits, mbits)


class Quantizer:
    """A quantizer of torchao's first kind: an object that quantizes a model."""

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, quantized in place."""
        raise NotImplementedError(f"{type(self).__name__} wants a quantize method.")


class Int8DynActInt4WeightLinear(nn.Linear):
    """A linear layer with an int4 weight by groups and int8 activations, as Int8DynActInt4WeightQuantizer leaves it."""


class Int8DynActInt4WeightQuantizer(Quantizer):
    """int4 weights by groups, int8 activations; a layer whose columns the group does not divide stays as it is."""

    def __init__(self, groupsize: int = 256, padding_allowed: bool = False, *args: Any, **kwargs: Any) -> None:
        self.groupsize = groupsize

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, quantized in place."""
        quantize_(model, int8_dynamic_activation_int4_weight(self.groupsize), _divided(self.groupsize))
        for module in model.modules():
            if type(module) is nn.Linear and isinstance(module.weight, View):
                module.__class__ = Int8DynActInt4WeightLinear
        return model


class Int4WeightOnlyQuantizer(Quantizer):
    """int4 weights by groups; a layer whose columns the group does not divide stays as it is."""

    def __init__(self, groupsize: int = 256, padding_allowed: bool = True, *args: Any, **kwargs: Any) -> None:
        self.groupsize = groupsize

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, quantized in place."""
        quantize_(model, int4_weight_only(self.groupsize), _divided(self.groupsize))
        return model


def _divided(groupsize: int) -> Any:
    return lambda module, name: is_linear(module) and module.weight.shape[-1] % groupsize == 0


def quantization_type(weight: Tensor) -> str:
    """What a weight is, for the description of its module."""
    told = getattr(weight, "_quantization_type", None)
    return (
        f"{type(weight).__name__}({told()})"
        if told
        else "not quantized"
        if type(weight) in (Tensor, nn.Parameter)
        else "not recognized"
    )


def _check_linear_int4_k(k: int, groupsize: int = 1, inner_k_tiles: int | None = None) -> bool:
    """Whether groups, and tiles of 16 columns where they are given, divide K."""
    return k % groupsize == 0 and (inner_k_tiles is None or k % (inner_k_tiles * 16) == 0)
