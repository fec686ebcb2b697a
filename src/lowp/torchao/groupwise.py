"""torchao's `quantization.utils`: scales of groups and of tokens for a matrix, and the pair of them that tinygemm reads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import affine
from .spelling import block_of
from .words import Granularity, MappingType, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken, ZeroPointDomain


def get_block_size(input_shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """How many elements of each axis share a scale.

    >>> get_block_size((8, 64), PerGroup(32))
    (1, 32)
    """
    shape = tuple(input_shape)
    if isinstance(granularity, PerTensor):
        return shape
    if isinstance(granularity, (PerAxis, PerRow)):
        axis = granularity.axis if isinstance(granularity, PerAxis) else granularity.dim
        axis %= len(shape)
        if isinstance(granularity, PerRow):
            return tuple(size if i == axis else 1 for i, size in enumerate(shape))
        return tuple(1 if i == axis else size for i, size in enumerate(shape))
    if isinstance(granularity, PerToken):
        return (1,) * (len(shape) - 1) + shape[-1:]
    if isinstance(granularity, PerGroup):
        return (1,) * (len(shape) - 1) + (granularity.group_size,)
    if isinstance(granularity, PerBlock) and len(granularity.block_size) <= len(shape):
        return (1,) * (len(shape) - len(granularity.block_size)) + granularity.block_size
    block_of(granularity)  # says what a granularity is
    raise AssertionError


def group_bounds(n_bit: int) -> tuple[int, int]:
    """The codes of tinygemm's unsigned integers."""
    return 0, 2**n_bit - 1


def get_groupwise_affine_qparams(
    w: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
    preserve_zero: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (N, K / groupsize) for asymmetric codes 0 .. 2**n_bit - 1; a float zero is in units of the value."""
    low, high = group_bounds(n_bit)
    block = (1, min(groupsize, w.shape[-1]) if groupsize > 0 else w.shape[-1])
    eps = 1e-6 if eps is None else eps
    if zero_point_domain is ZeroPointDomain.FLOAT and not preserve_zero:
        scale, zero = affine.choose_qparams_affine_tinygemm(
            w, MappingType.ASYMMETRIC, block, torch.int32, low, high, eps, dtype, dtype
        )
    else:
        choose = affine.choose_qparams_affine if preserve_zero else affine.choose_qparams_affine_dont_preserve_zero
        scale, zero = choose(w, MappingType.ASYMMETRIC, block, torch.int32, low, high, eps, dtype, dtype)
    return scale.to(dtype).reshape(w.shape[0], -1), zero.to(dtype).reshape(w.shape[0], -1)


def pack_tinygemm_scales_and_zeros(scales: Tensor, zeros: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(N, G) scales and zeros as tinygemm reads them: (G, N, 2)."""
    return torch.stack((scales.to(dtype), zeros.to(dtype)), dim=-1).transpose(0, 1).contiguous()


def unpack_tinygemm_scales_and_zeros(scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_tinygemm_scales_and_zeros`, each (N, G, 1)."""
    scales, zeros = torch.split(scales_and_zeros.transpose(0, 1), 1, 2)
    return scales, zeros


def groupwise_affine_quantize_tensor_from_qparams(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
) -> Tensor:
    """Codes (N, K) int32 by scales that are given."""
    low, high = group_bounds(n_bit)
    block = (1, min(groupsize, w.shape[-1]))
    floats = zero_point_domain is ZeroPointDomain.FLOAT
    quantize = affine.quantize_affine_tinygemm if floats else affine.quantize_affine
    return quantize(w, block, scales, zeros, torch.int32, low, high)


def groupwise_affine_quantize_tensor(
    w: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
    preserve_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes (N, K) int32, and scales with zeros as tinygemm reads them."""
    scales, zeros = get_groupwise_affine_qparams(w, n_bit, groupsize, dtype, zero_point_domain, preserve_zero)
    codes = groupwise_affine_quantize_tensor_from_qparams(w, scales, zeros, n_bit, groupsize, zero_point_domain)
    return codes, pack_tinygemm_scales_and_zeros(scales, zeros, dtype)


def groupwise_affine_dequantize_tensor_from_qparams(
    w_int4x8: Tensor,
    scales: Tensor,
    zeros: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
) -> Tensor:
    """The values of codes (N, K), in the scales' dtype."""
    low, high = group_bounds(n_bit)
    block = (1, min(groupsize, w_int4x8.shape[-1]))
    floats = zero_point_domain is ZeroPointDomain.FLOAT
    dequantize = affine.dequantize_affine_tinygemm if floats else affine.dequantize_affine
    return dequantize(w_int4x8, block, scales, zeros, w_int4x8.dtype, low, high, output_dtype=scales.dtype)


def groupwise_affine_dequantize_tensor(
    w_int4x8: Tensor, scales_and_zeros: Tensor, n_bit: int = 4, groupsize: int = 128
) -> Tensor:
    """The values of codes (N, K) by scales with zeros as tinygemm reads them."""
    scales, zeros = unpack_tinygemm_scales_and_zeros(scales_and_zeros)
    rows = scales.shape[0]
    return groupwise_affine_dequantize_tensor_from_qparams(
        w_int4x8, scales.reshape(rows, -1), zeros.reshape(rows, -1), n_bit, groupsize
    )


def get_group_qparams_symmetric(
    w: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    precision: torch.dtype = torch.float32,
    mapping_type: MappingType = MappingType.SYMMETRIC,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (N, K / groupsize) for signed codes of n_bit bits."""
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    scale, zero = affine.choose_qparams_affine(
        w, mapping_type, (1, groupsize), torch.int8, low, high, eps, precision, precision
    )
    return scale.reshape(w.shape[0], -1), zero.reshape(w.shape[0], -1)


def group_quantize_tensor_symmetric(
    w: Tensor,
    n_bit: int = 4,
    group_size: int = 128,
    precision: torch.dtype = torch.float32,
    mapping_type: MappingType = MappingType.SYMMETRIC,
) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes (N, K) int8 of n_bit bits, scales and zero points."""
    scales, zeros = get_group_qparams_symmetric(w, n_bit, group_size, precision, mapping_type)
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    codes = affine.quantize_affine(w, (1, group_size), scales, zeros, torch.int8, low, high)
    return codes, scales, zeros


def per_token_dynamic_quant(
    input: Tensor,
    scale_dtype: torch.dtype = torch.float32,
    zero_point_dtype: torch.dtype = torch.float32,
    eps: float | None = None,
) -> Tensor:
    """An activation through asymmetric int8, a scale for each token: quantized and dequantized, in its own dtype."""
    block = (1,) * (input.dim() - 1) + (input.shape[-1],)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    scale, zero = affine.choose_qparams_affine(
        input, MappingType.ASYMMETRIC, block, torch.int8, -128, 127, eps, scale_dtype, zero_point_dtype
    )
    codes = affine.quantize_affine(input, block, scale, zero, torch.int8, -128, 127)
    return affine.dequantize_affine(codes, block, scale, zero, torch.int8, -128, 127, output_dtype=input.dtype)


def quantize_activation_per_token_absmax(t: Tensor) -> tuple[Tensor, Tensor]:
    """An activation (..., K) in symmetric int8 and a scale for each token; scales are at least 1e-5, codes within +-127."""
    block = (1,) * (t.dim() - 1) + (t.shape[-1],)
    scale, zero = affine.choose_qparams_affine(
        t, MappingType.SYMMETRIC, block, torch.int8, -127, 127, eps=1e-5, scale_dtype=_scale_dtype(t)
    )
    return affine.quantize_affine(t, block, scale, zero, torch.int8, -127, 127), scale


def _scale_dtype(t: Tensor) -> torch.dtype | None:
    return torch.float32 if t.dtype == torch.float16 else None


def dynamically_quantize_per_channel(
    x: Tensor, quant_min: int, quant_max: int, target_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (N, K) with a symmetric scale for each row: codes, scales (N,), zero points (N,)."""
    block = (1, x.shape[1])
    eps = torch.finfo(torch.float32).eps
    scale, zero = affine.choose_qparams_affine(
        x, MappingType.SYMMETRIC, block, target_dtype, quant_min, quant_max, eps, zero_point_dtype=torch.int64
    )
    return affine.quantize_affine(x, block, scale, zero, target_dtype, quant_min, quant_max), scale, zero


def dequantize_per_channel(
    int_repr: Tensor, scales: Tensor, zero_points: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of codes (N, K) by rows."""
    return affine.affine_values(int_repr, (1, int_repr.shape[1]), scales, zero_points, out_dtype)


def dequantize_per_tensor(
    int_repr: Tensor, scale: Tensor, zero_point: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values of codes of any shape by one scale."""
    return affine.affine_values(int_repr, tuple(int_repr.shape), scale, zero_point, out_dtype)


def per_token_block_size(x: Tensor) -> list[int]:
    """The block_size of a scale for each token: the whole of the last axis.

    >>> per_token_block_size(torch.zeros(2, 3, 8))
    [1, 1, 8]
    """
    return list(get_block_size(tuple(x.shape), PerToken()))


# -- integer products ---------------------------------------------------------------------------------------------------


def safe_int_mm(input: Tensor, mat2: Tensor) -> Tensor:
    """int8 (M, K) @ int8 (K, N) as int32 (M, N), for any M, K and N: on CUDA both are padded to what its product takes.

    >>> safe_int_mm(torch.full((1, 2), 3, dtype=torch.int8), torch.full((2, 1), 4, dtype=torch.int8))
    tensor([[24]], dtype=torch.int32)
    """
    if input.device.type != "cuda":
        return torch._int_mm(input, mat2)
    (rows, inner), columns = input.shape, mat2.shape[1]
    more_rows, more_inner, more_columns = (
        max(17 - rows, 0),
        -inner % 8,
        -columns % 8,
    )  # cuBLAS: M > 16, K and N in eights
    left = torch.nn.functional.pad(input, (0, more_inner, 0, more_rows))
    right = torch.nn.functional.pad(mat2, (0, more_columns, 0, more_inner))
    return torch._int_mm(left, right)[:rows, :columns]


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The same under another name."""
    return safe_int_mm(a, b)


def int_scaled_matmul(a: Tensor, b: Tensor, scales1: Tensor) -> Tensor:
    """int8 (M, K) @ int8 (K, N) times a scale for each row, (M, 1) or one; in the scale's dtype."""
    return safe_int_mm(a, b) * scales1
