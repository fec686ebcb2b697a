"""AutoRound: learn for each weight whether to round up or down, and each block's range, by the sign of the gradient.

Rounding to nearest is best for each weight alone, not for the sum that a layer computes. Here every weight gets an offset v,
which is learned:

    Q(v)  = dequantize(nearest(W + v s))            |v| <= 1/2, s the step of the block
    loss  = trace((W - Q) H (W - Q)^T)              the error of the layer's output, H = sum x x^T
    v    <- v - lr sign(d loss / d v)               lr falls linearly to 0; the gradient of rounding is taken for 1

Each block's range is that of least weighed squared error. No activation is kept, and a step costs one product with H. The best
step is kept, and none is worse than the format's own rounding. Encoding is `numerics`' grid, so every format works.

Source: Cheng et al., SignRound (AutoRound), arXiv 2309.05516: the parameters, the step and the 200 iterations; they minimise the
error of a whole block's output on samples, here it is each layer's over all tokens.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..numerics import Format, Parts, dequantize, quantize
from ..numerics.math import quantize_given, read_scale
from ..quantize.method import Method, register
from ..quantize.statistics import Statistics, squared_output


def autoround(weight: Tensor, statistics: Statistics | None, fmt: Format, *, iterations: int = 200) -> Parts:
    """Quantize a weight by learned rounding.

    Args:
        weight: (N, K), float. statistics: of its inputs. fmt: any format but a plain float. iterations: steps of the gradient.

    Returns:
        Parts. Without inputs: rounded to nearest.

    >>> seen = Statistics.empty(64)
    >>> seen.update(torch.randn(256, 64))
    >>> autoround(torch.randn(8, 64), seen, Format.parse("int4/1x32*bf16"), iterations=5).scale.shape
    torch.Size([8, 2])
    """
    importance = None if statistics is None else statistics.importance_K()
    if fmt.is_identity or importance is None or not weight.numel():
        return quantize(weight, fmt)
    assert statistics is not None and statistics.hessian_KK is not None
    weight, hessian_KK = weight.to(torch.float32), statistics.hessian_KK / statistics.tokens
    best = quantize(weight, fmt.with_rule("mse"), importance=importance)
    plain = quantize(weight, fmt)
    losses = {id(parts): squared_output(weight - dequantize(parts, fmt), hessian_KK) for parts in (best, plain)}
    best = min((best, plain), key=lambda parts: losses[id(parts)])
    least, start = losses[id(best)], best
    step = _spread(read_scale(start, fmt), fmt, weight)
    offset = torch.zeros_like(weight)
    for iteration in range(iterations):
        parts = _rounded(weight + offset * step, fmt, start)
        error = dequantize(parts, fmt) - weight
        slope = error @ hessian_KK
        loss = float((slope * error).sum(dtype=torch.float64))
        if loss < least:
            best, least = parts, loss
        rate = (1.0 - iteration / iterations) / iterations
        offset = (offset - rate * slope.sign()).clamp_(-0.5, 0.5)
    return best


def _rounded(weight: Tensor, fmt: Format, start: Parts) -> Parts:
    """The codes nearest to a weight in the scales that were chosen."""
    zero_point = None if start.zero_point is None else start.zero_point.to(torch.float32)
    parts = quantize_given(weight, fmt, read_scale(start, fmt), zero_point)
    return start.replace(qdata=parts.qdata)


def _spread(scale: Tensor, fmt: Format, weight: Tensor) -> Tensor:
    bn, bk = fmt.block_dims(tuple(weight.shape))
    return scale.repeat_interleave(bn, dim=0).repeat_interleave(bk, dim=1)


def _why_not(fmt: Format) -> str:
    return f"autoround has nothing to round in {fmt}" if fmt.is_identity else ""


def method(iterations: int = 200) -> Method:
    """AutoRound with another number of steps, for `quantize_(..., method=...)`."""
    return Method(
        name="autoround",
        about="up or down learned for each weight by the sign of the gradient (wants data)",
        run=functools.partial(autoround, iterations=iterations),
        why_not=_why_not,
        wants_data=True,
        options=f"iterations={iterations}",
    )


register(method())
