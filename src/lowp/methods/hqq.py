"""HQQ: half-quadratic quantization, a better zero point (or scale) without any data.

Rounding to nearest minimises the squared error, but what hurts a model are the few large errors' effect on the many small
weights. HQQ minimises a sparse error norm, p < 1, which lets outliers go and fits the rest:

    minimise over z      || W - dequantize(quantize(W; s, z)) ||_p          p = 0.7

A helper variable E, the part of the error that is allowed to be large, splits it into two steps that each have a closed form:

    E <- shrink(W - W_r, beta)      sign(x) * max(|x| - |x|**(p-1) / beta, 0)       the generalised soft threshold
    z <- mean over the block of  (Q - (W - E) / s)                                  with Q the codes
    beta <- kappa * beta

Without a zero point there is no z, and the scale takes its place: s <- <W - E, Q> / <Q, Q>. Errors are measured in steps, that
is divided by the scale, so that beta means the same in every block. Each block keeps the best of all steps by mean |error|**p,
among those whose squared error is no larger than that of the plain rounding it started from: so it never ends worse in either
measure, also where outliers tempt the sparse norm to clip them. Blocks know nothing of one another, so a weight may be quantized
in pieces.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023, https://mobiusml.github.io/hqq_blog/;
p = 0.7, beta = 10, kappa = 1.01 and 20 iterations as there; the early stop is where nothing moves any more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Format, Parts, quantize
from ..numerics.math import quantize_given, read_scale, to_blocks
from ..quantize.method import Method, register
from ..quantize.statistics import Statistics

_P, _BETA, _KAPPA, _ITERATIONS = 0.7, 10.0, 1.01, 20


def _shrink(x: Tensor, beta: float) -> Tensor:
    magnitude = x.abs()
    return x.sign() * (magnitude - magnitude.clamp(min=1e-12).pow(_P - 1) / beta).clamp(min=0)


def hqq(weight: Tensor, fmt: Format) -> Parts:
    """Quantize a weight by HQQ.

    Args:
        weight: (..., N, K), float. fmt: an integer format, with or without zero point.

    Returns:
        Parts.

    >>> hqq(torch.randn(8, 64), Format.parse("int4/1x32*bf16+bf16")).zero_point.shape
    torch.Size([8, 2])
    """
    start = quantize(weight, fmt)
    if not weight.numel():
        return start
    shape = tuple(weight.shape)
    block = fmt.block_dims(shape)
    blocks = to_blocks(weight.to(torch.float32), block)
    symmetric = start.zero_point is None
    scale = read_scale(start, fmt)
    zero = torch.zeros_like(scale) if start.zero_point is None else start.zero_point.to(torch.float32)
    step = _over(scale, shape)  # the unit of all errors
    best_scale, best_zero, best_error = scale, zero, torch.full_like(scale, torch.inf)
    beta, allowed = _BETA, None
    for _ in range(_ITERATIONS + 1):
        parts = quantize_given(weight, fmt, scale, None if symmetric else zero)
        codes = to_blocks(fmt.element.decode(parts.qdata), block)
        offset = 0.0 if parts.zero_point is None else _over(parts.zero_point.to(torch.float32), shape)
        residual = blocks - (codes - offset) * _over(read_scale(parts, fmt), shape)
        error = (residual / step).abs().pow(_P).mean(dim=(-3, -1)).reshape(scale.shape)
        squares_off = residual.square().sum(dim=(-3, -1)).reshape(scale.shape)
        allowed = squares_off if allowed is None else allowed
        better = (error < best_error) & (squares_off <= allowed)
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        kept = blocks - _shrink(residual / step, beta) * step
        if symmetric:
            squares = codes.square().sum(dim=(-3, -1)).reshape(scale.shape)
            fitted = (kept * codes).sum(dim=(-3, -1)).reshape(scale.shape) / squares.clamp(min=1.0)
            moved = torch.where(fitted > 0, fitted, scale)
            settled, scale = torch.equal(moved, scale), moved
        else:
            moved = (codes - kept / step).mean(dim=(-3, -1)).reshape(zero.shape)
            settled, zero = torch.equal(moved, zero), moved
        if settled:
            break
        beta *= _KAPPA
    return quantize_given(weight, fmt, best_scale, None if symmetric else best_zero)


def _over(per_block: Tensor, shape: tuple[int, ...]) -> Tensor:
    matrix = per_block.unsqueeze(0) if len(shape) == 1 else per_block
    return matrix.unsqueeze(-1).unsqueeze(-3)


def _why_not(fmt: Format) -> str:
    if fmt.element.kind != "int" or fmt.scale == "e8m0":
        return f"hqq is for integers with a free scale, got {fmt}"
    return ""


def _run(weight: Tensor, statistics: Statistics | None, fmt: Format) -> Parts:
    return hqq(weight, fmt)


register(
    Method(
        name="hqq",
        about="half-quadratic: zero point or scale by a sparse error norm",
        run=_run,
        why_not=_why_not,
        by_rows=True,
    )
)
