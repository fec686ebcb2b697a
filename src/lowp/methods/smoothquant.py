"""SmoothQuant: move what is hard to round from the activations into the weights.

Few input columns of a transformer are a hundred times larger than the others, and a token's scale must reach to them. Dividing
column j of the input by s_j, and multiplying it into the weight, leaves the product as it is and shares the difficulty:

    s_j = max|x_j| ** alpha / max|w_j| ** (1 - alpha)        alpha = 0.5 shares evenly

It is for schemes that quantize activations; where only the weight is quantized there is nothing to move.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import Format, Parts, Scheme, quantize
from ..quantize.method import Method, register
from ..quantize.statistics import Statistics

_SMALLEST = 1e-5  # of both maxima: a column without inputs or weights is left alone


def smooth_factor(
    weights: Sequence[Tensor], statistics: Statistics, schemes: Sequence[Scheme], *, alpha: float = 0.5
) -> Tensor | None:
    """The factor of the input for layers that share it, 1/s.

    Args:
        weights: (N, K) each. statistics: of their input. schemes: of each. alpha: 0 leaves the input's range, 1 evens it out.

    Returns:
        (K,), or None where no scheme quantizes the activation.

    >>> seen = Statistics.empty(2)
    >>> seen.update(torch.tensor([[4.0, 1.0]]))
    >>> smooth_factor([torch.tensor([[1.0, 1.0]])], seen, [Scheme.parse("int8/row@int8/row")])
    tensor([0.5000, 1.0000])
    """
    if not any(scheme.act is not None for scheme in schemes):
        return None
    amax_x = statistics.amax_K
    amax_w = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    s_K = amax_x.clamp(min=_SMALLEST) ** alpha / amax_w.clamp(min=_SMALLEST) ** (1 - alpha)
    dead = (amax_x < _SMALLEST) | (amax_w < _SMALLEST)
    return torch.where(dead, 1.0, s_K.reciprocal())


def _plain(weight: Tensor, statistics: Statistics | None, fmt: Format) -> Parts:
    return quantize(weight, fmt)


def method(alpha: float = 0.5) -> Method:
    """SmoothQuant with another alpha, for `quantize_(..., method=...)`."""
    return Method(
        name="smoothquant",
        about="the range of activations shared with the weights (wants data)",
        run=_plain,
        why_not=lambda fmt: "",
        wants_data=True,
        smooth=functools.partial(smooth_factor, alpha=alpha),
        options=f"alpha={alpha}",
    )


register(method())
