"""torchao's functions for MX and NVFP4 on plain tensors: casts, nibbles, and the order of scales that tensor cores want.

`to_blocked` lays a matrix of scales (R, C) out in tiles of 128 x 4, each tile as 32 rows of 16 bytes: row r goes to line
r % 32, and its four columns to bytes 4 * (r // 32) onward. Rows and columns are padded with zeros to whole tiles.
Source: cuBLAS, "1D block scaling factors layout", https://docs.nvidia.com/cuda/cublas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import ELEMENTS, Format, Parts, dequantize, quantize
from ..numerics.bits import pack_bits, unpack_bits
from .spelling import element_of
from .words import ScaleCalculationMode

DTYPE_FP6_E2M3 = "fp6_e2m3"
DTYPE_FP6_E3M2 = "fp6_e3m2"
E4M3_MAX, E2M1_MAX = ELEMENTS["e4m3"].max, ELEMENTS["e2m1"].max


# -- scales in tiles ------------------------------------------------------------------------------------------------------


def to_blocked(input_matrix: Tensor, use_triton_kernel: bool = False) -> Tensor:
    """Scales (R, C) of one byte in the order of tensor cores, flat, padded to whole tiles of 128 x 4."""
    rows, columns = input_matrix.shape
    row_tiles, column_tiles = -(-rows // 128), -(-columns // 4)
    padded = torch.zeros(row_tiles * 128, column_tiles * 4, dtype=torch.uint8, device=input_matrix.device)
    padded[:rows, :columns] = input_matrix.view(torch.uint8)
    tiles = padded.view(row_tiles, 4, 32, column_tiles, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(input_matrix.dtype)


def from_blocked(blocked_tensor: Tensor, original_rows: int, original_cols: int) -> Tensor:
    """The inverse of `to_blocked`.

    >>> scales = torch.arange(12, dtype=torch.uint8).view(3, 4)
    >>> torch.equal(from_blocked(to_blocked(scales), 3, 4), scales)
    True
    """
    row_tiles, column_tiles = -(-original_rows // 128), -(-original_cols // 4)
    if blocked_tensor.numel() != row_tiles * column_tiles * 512:
        raise MisfitError(
            f"scales of {original_rows} x {original_cols} in tiles are {row_tiles * column_tiles * 512} bytes, "
            f"got {blocked_tensor.numel()}: pass the shape before padding."
        )
    tiles = blocked_tensor.reshape(-1).view(torch.uint8).view(row_tiles, column_tiles, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * 128, column_tiles * 4)
    return plain[:original_rows, :original_cols].contiguous().view(blocked_tensor.dtype)


# -- MX -------------------------------------------------------------------------------------------------------------------


def to_mx(
    data_hp: Tensor,
    elem_dtype: Any,
    block_size: int,
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.FLOOR,
    is_swizzled_scales: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantize to MX.

    Args:
        data_hp: (..., K), float; K a multiple of block_size. elem_dtype: float8, float4_e2m1fn_x2, "fp6_e2m3" or "fp6_e3m2".

    Returns:
        scale (..., K / block_size) e8m0, qdata: float8 (..., K), or uint8: nibbles (..., K / 2), 6 bits to a byte (..., K).
    """
    element = ELEMENTS[element_of(elem_dtype)]
    parts = quantize(data_hp, Format.parse(f"{element.name}/1x{block_size}*e8m0~{scaling_mode.value}"))
    assert parts.scale is not None
    codes = parts.qdata if element.bits == 8 else element.to_codes(parts.qdata)
    codes = pack_bits(codes, 4) if element.bits == 4 else codes
    scale = parts.scale
    return (to_blocked(scale.flatten(0, -2)) if is_swizzled_scales else scale), codes


def to_dtype(
    data_lp: Tensor, scale_e8m0: Tensor, elem_dtype: Any, block_size: int, target_dtype: torch.dtype
) -> Tensor:
    """The values of MX codes, the inverse of `to_mx`."""
    element = ELEMENTS[element_of(elem_dtype)]
    codes = data_lp
    if element.bits == 4:
        codes = element.from_codes(unpack_bits(data_lp.view(torch.uint8), 4, data_lp.shape[-1] * 2))
    elif element.bits == 6:
        codes = element.from_codes(data_lp)
    scale = scale_e8m0.reshape(*codes.shape[:-1], codes.shape[-1] // block_size)
    fmt = Format.parse(f"{element.name}/1x{block_size}*e8m0")
    return dequantize(Parts(qdata=codes, scale=scale), fmt, target_dtype)


def get_fp_scale(scale_e8m0: Tensor) -> Tensor:
    """An e8m0 scale as float32."""
    return ELEMENTS["e8m0"].decode(scale_e8m0.view(torch.float8_e8m0fnu))


# -- NVFP4 ------------------------------------------------------------------------------------------------------------------


def per_tensor_amax_to_scale(amax: Tensor) -> Tensor:
    """The scale of the whole tensor, amax / (448 * 6)."""
    return amax.to(torch.float32) / (E4M3_MAX * E2M1_MAX)


def nvfp4_quantize(
    data_hp: Tensor, block_size: int = 16, per_tensor_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize to NVFP4.

    Args:
        data_hp: (..., K), float; K a multiple of 16. per_tensor_scale: of `per_tensor_amax_to_scale`, or None for one level.

    Returns:
        scale (..., K / 16) e4m3, qdata (..., K / 2) uint8, the even element in the low nibble.
    """
    if block_size != 16:
        raise MisfitError(f"NVFP4 has blocks of 16, got {block_size}.")
    fmt = Format.parse("e2m1/1x16*e4m3" if per_tensor_scale is None else "e2m1/1x16*e4m3/tensor")
    parts = quantize(data_hp, fmt, outer=per_tensor_scale)
    assert parts.scale is not None
    return parts.scale, pack_bits(ELEMENTS["e2m1"].to_codes(parts.qdata), 4)


# -- codes ------------------------------------------------------------------------------------------------------------------


def pack_uint4(uint8_data: Tensor) -> Tensor:
    """Two codes a byte along the last axis, the even one in the low nibble."""
    return pack_bits(uint8_data.contiguous(), 4)


def unpack_uint4(uint8_data: Tensor) -> Tensor:
    """The inverse of `pack_uint4`."""
    return unpack_bits(uint8_data.contiguous(), 4, uint8_data.shape[-1] * 2)


def _encode(x: Tensor, element: str) -> Tensor:
    return ELEMENTS[element].to_codes(ELEMENTS[element].encode(x.to(torch.float32)))


def _decode(codes: Tensor, element: str) -> Tensor:
    return ELEMENTS[element].decode(ELEMENTS[element].from_codes(codes))


def f32_to_f4_unpacked(x: Tensor) -> Tensor:
    """float32 to codes of e2m1, one to a byte."""
    return _encode(x, "e2m1")


def f4_unpacked_to_f32(x: Tensor) -> Tensor:
    """Codes of e2m1, one to a byte, to float32."""
    return _decode(x, "e2m1")


def f32_to_f6_e2m3_unpacked(x: Tensor) -> Tensor:
    """float32 to codes of e2m3, one to a byte."""
    return _encode(x, "e2m3")


def f6_e2m3_unpacked_to_f32(x: Tensor) -> Tensor:
    """Codes of e2m3, one to a byte, to float32."""
    return _decode(x, "e2m3")


def f32_to_f6_e3m2_unpacked(x: Tensor) -> Tensor:
    """float32 to codes of e3m2, one to a byte."""
    return _encode(x, "e3m2")


def f6_e3m2_unpacked_to_f32(x: Tensor) -> Tensor:
    """Codes of e3m2, one to a byte, to float32."""
    return _decode(x, "e3m2")


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def hp_data_dims_to_swizzled_scale_dims_nvfp4(hp_data_M: int, hp_data_K: int) -> tuple[int, int]:
    """The shape of swizzled NVFP4 scales for a tensor (M, K)."""
    return ceil_div(hp_data_M, 128) * 32, ceil_div(hp_data_K // 16, 4) * 16


def hp_data_dims_to_swizzled_scale_dims_mx(hp_data_M: int, hp_data_K: int) -> tuple[int, int]:
    """The shape of swizzled MX scales, of blocks of 32, for a tensor (M, K)."""
    return ceil_div(hp_data_M, 128) * 32, ceil_div(hp_data_K // 32, 4) * 16
