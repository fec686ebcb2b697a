"""AWQ: give the columns that matter a larger share of their block's range.

A column whose inputs are large costs more when it is rounded badly. Multiplying it by s > 1 before rounding, and its input by
1/s, makes its rounding error s times smaller, as long as it does not become the largest of its block. AWQ takes

    s = mean|x| ** alpha        alpha from a grid over [0, 1), scaled to sqrt(max s * min s) = 1

the alpha with the least error of the outputs of all layers that share the input. That error is read off H = sum x x^T, so no
activation is kept: trace((W - Q_s) H (W - Q_s)^T) with Q_s = round(W s) / s. The factor of the input is 1/s; it is folded into
the operation before the layer where one can take it, and kept as `act_pre_scale` where none can (see `quantize/smooth.py`).
Blocks are then rounded in the range of least weighed squared error, which is AWQ's clipping.

Source: Lin et al., AWQ, arXiv 2306.00978, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..numerics import Format, Parts, Scheme, dequantize, quantize
from ..quantize.method import Method, register
from ..quantize.statistics import Statistics, squared_output

_GRID = 20  # values of alpha
_SMALLEST = 1e-4  # of s before it is scaled: a column without inputs


def awq_factor(weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[Scheme]) -> Tensor | None:
    """The factor of the input that AWQ chooses for layers that share it.

    Args:
        weights: (N, K) each. statistics: of their input. schemes: of each.

    Returns:
        (K,), 1/s; None where no grid point is better than none.
    """
    assert statistics.hessian_KK is not None
    mean_K = (statistics.sum_K / max(statistics.tokens, 1)).clamp(min=_SMALLEST)
    best, found = None, None
    for step in range(_GRID):
        s_K = mean_K ** (step / _GRID)
        s_K = s_K / (s_K.max() * s_K.min()).sqrt()
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            values = dequantize(quantize(weight * s_K, scheme.weight), scheme.weight) / s_K
            error += squared_output(weight - values, statistics.hessian_KK)
        if best is None or error < best:
            best, found = error, (None if step == 0 else s_K.reciprocal())
    return found


def clipped(weight: Tensor, statistics: Statistics | None, fmt: Format) -> Parts:
    """Round each block in the range of least squared error, each column weighed by the mean square of its input."""
    importance = None if statistics is None else statistics.importance_K()
    return quantize(weight, fmt if importance is None else fmt.with_rule("mse"), importance=importance)


def _why_not(fmt: Format) -> str:
    return f"awq has nothing to round in {fmt}" if fmt.is_identity else ""


register(
    Method(
        name="awq",
        about="important columns get more of their block's range, blocks clipped by weighed error (wants data)",
        run=clipped,
        why_not=_why_not,
        wants_data=True,
        smooth=awq_factor,
    )
)
