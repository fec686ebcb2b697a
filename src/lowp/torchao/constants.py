"""Numbers that torchao names: bounds of the small floats, widths and bounds of integers, and what its safetensors may hold.

All follow from our elements: `max` is the largest value, `max_pow2` the exponent of the largest power of two, `emin` that of the
smallest normal number.
"""

from __future__ import annotations

import math

import torch

from ..numerics import ELEMENTS
from . import affine
from .mx import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2, E2M1_MAX, E4M3_MAX
from .words import TorchAODType

# -- small floats -------------------------------------------------------------------------------------------------------------

F8E4M3_MAX, F4_E2M1_MAX = E4M3_MAX, E2M1_MAX
F8E5M2_MAX, F6_E2M3_MAX, F6_E3M2_MAX = (ELEMENTS[name].max for name in ("e5m2", "e2m3", "e3m2"))
F8E4M3_MAX_POW2, F8E5M2_MAX_POW2, F6_E2M3_MAX_POW2, F6_E3M2_MAX_POW2, F4_E2M1_MAX_POW2 = (
    math.frexp(ELEMENTS[name].max)[1] - 1 for name in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
)
E4M3_EPS = torch.finfo(torch.float8_e4m3fn).tiny  # 2**-6
E8M0_EXPONENT_BIAS = F32_EXP_BIAS = BF16_EXP_BIAS = 127
E8M0_EXPONENT_NAN_VAL = 255
F6_E2M3_EXP_BIAS, F6_E3M2_EXP_BIAS, F4_E2M1_EXP_BIAS = (ELEMENTS[name].bias for name in ("e2m3", "e3m2", "e2m1"))
F32_MIN_NORMAL = torch.finfo(torch.float32).smallest_normal
F6_E2M3_MIN_NORMAL, F6_E3M2_MIN_NORMAL, F4_E2M1_MIN_NORMAL = 1.0, 0.25, 1.0  # 2**(1 - bias)
F6_E2M3_MAX_INT = F6_E3M2_MAX_INT = 31  # 0b011111, the largest code without its sign
F4_E2M1_MAX_INT = 7
BLOCK_SIZE_DEFAULT = 32
DTYPE_FP4 = torch.float4_e2m1fn_x2
SUPPORTED_ELEM_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, DTYPE_FP6_E2M3, DTYPE_FP6_E3M2, DTYPE_FP4]
DTYPE_TO_SHORT_STR = dict(zip(SUPPORTED_ELEM_DTYPES, ("f8e4m3", "f8e5m2", "f6e2m3", "f6e3m2", "f4e2m1"), strict=True))

# -- integers ---------------------------------------------------------------------------------------------------------------

_DTYPE_TO_QVALUE_BOUNDS = affine.BOUNDS
_SUB_BYTE_UINT_BOUNDS = {getattr(torch, f"uint{bits}"): (0, 2**bits - 1) for bits in range(1, 8)}
_SUB_BYTE_INT_BOUNDS = {
    kind: affine.BOUNDS[kind]
    for bits in range(1, 8)
    for kind in (TorchAODType[f"INT{bits}"], getattr(torch, f"int{bits}"))
}
_DTYPE_TO_BIT_WIDTH = {kind: (high - low).bit_length() for kind, (low, high) in affine.BOUNDS.items()}
FP8_TYPES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}

# -- NF4 and safetensors --------------------------------------------------------------------------------------------------------

_INNER_TENSOR_NAMES_FOR_SHARDING = ["quantized_scalers", "quantization_factor", "quantized_data"]
CHUNK_SIZE = 1024**2  # how many elements torchao quantizes at once; ours does not depend on it
ALLOWED_TENSORS_SUBCLASSES = [
    "Float8Tensor", "Int4Tensor", "Int4TilePackedTo4dTensor", "IntxUnpackedToInt8Tensor", "Int8Tensor", "Int4PlainInt32Tensor",
    "MXTensor", "NVFP4Tensor",
]  # fmt: skip
