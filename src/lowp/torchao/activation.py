"""An activation through the tensor class that its description names: what a quantized linear layer does with its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MisfitError
from .microscale import MXTensor, NVFP4Tensor
from .mx import per_tensor_amax_to_scale
from .tensors import Float8Tensor, Int8Tensor
from .words import (
    QuantizeTensorToFloat8Kwargs,
    QuantizeTensorToInt8Kwargs,
    QuantizeTensorToMXKwargs,
    QuantizeTensorToNVFP4Kwargs,
)


def quantize_tensor(tensor: Tensor, quant_kwargs: Any, **more: Any) -> Any:
    """A float tensor as the tensor class of a description.

    Args:
        tensor: (..., K). quant_kwargs: QuantizeTensorToInt8Kwargs and its kin. more: for Int8Tensor, a scale and zero point.
    """
    given = quant_kwargs
    if isinstance(given, QuantizeTensorToInt8Kwargs):
        return Int8Tensor.from_hp(tensor, given.granularity, given.mapping_type, **more)
    if isinstance(given, QuantizeTensorToFloat8Kwargs):
        return Float8Tensor.from_hp(
            tensor, given.float8_dtype, given.granularity, given.mm_config, given.hp_value_lb, given.hp_value_ub
        )
    if isinstance(given, QuantizeTensorToMXKwargs):
        return MXTensor.to_mx(tensor, given.elem_dtype, given.block_size, given.scaling_mode)
    if isinstance(given, QuantizeTensorToNVFP4Kwargs):
        dynamic = given.use_dynamic_per_tensor_scale
        outer = per_tensor_amax_to_scale(tensor.detach().abs().amax()) if dynamic else None
        return NVFP4Tensor.to_nvfp4(tensor, 16, outer)
    raise MisfitError(
        f"an activation is described by QuantizeTensorToInt8Kwargs or its kin, got {type(given).__name__}."
    )
