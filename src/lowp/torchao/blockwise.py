"""float8 in blocks of 128, as functions: activations in blocks 1x128 along K, weights in blocks 128x128, a scale for each.

    q = x / s,  s = amax / 448        y = (a * a_s) @ (b * b_s).T, summed in float32, in bfloat16

The product is `lowp.ops.product`, on every device. Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import Format, Parts, dequantize, quantize
from ..ops.product import product
from .spelling import element_of


def _quantized(x: Tensor, block: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts = quantize(x, Format.parse(f"{element_of(dtype)}/{block}"))
    assert parts.scale is not None
    return parts.qdata, parts.scale


def fp8_blockwise_act_quant(
    x: Tensor, block_size: int = 128, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes (..., K) and scales (..., K / block_size) of an activation.

    >>> [tuple(t.shape) for t in fp8_blockwise_act_quant(torch.ones(2, 256))]
    [(2, 256), (2, 2)]
    """
    return _quantized(x, f"1x{block_size}", dtype)


def fp8_blockwise_weight_quant(
    x: Tensor, block_size: int = 128, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales (N / block_size, K / block_size) of a weight."""
    return _quantized(x, f"{block_size}x{block_size}", dtype)


def fp8_blockwise_weight_dequant(x: Tensor, s: Tensor, block_size: int = 128) -> Tensor:
    """The values (N, K) of codes and scales as `fp8_blockwise_weight_quant` answers them, in torch's default dtype."""
    fmt = Format.parse(f"{element_of(x.dtype)}/{block_size}x{block_size}")
    return dequantize(Parts(qdata=x, scale=s), fmt, torch.get_default_dtype())


def blockwise_fp8_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor, block_size: int = 128) -> Tensor:
    """Codes (..., K) and (N, K) with their scales -> (..., N) in bfloat16.

    Raises:
        MisfitError: scales of another shape than the blocks have.
    """
    weight, act = (
        f"{element_of(t.dtype)}/{block}" for t, block in ((b, f"{block_size}x{block_size}"), (a, f"1x{block_size}"))
    )
    for name, codes, scale, spelling in (("a_s", a, a_s, act), ("b_s", b, b_s, weight)):
        wanted = Format.parse(spelling).scale_shape(tuple(codes.shape))
        if tuple(scale.shape) != tuple(wanted):
            raise MisfitError(
                f"blockwise_fp8_gemm wants {name} {tuple(wanted)} for {tuple(codes.shape)}, got {tuple(scale.shape)}."
            )
    rows = [a.reshape(-1, a.shape[-1]), a_s.reshape(-1, a_s.shape[-1])]
    return product(rows, [b, b_s], f"{weight}@{act}", torch.bfloat16).view(*a.shape[:-1], b.shape[0])
