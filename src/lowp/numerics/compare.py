"""How far apart two tensors are: the measures used in tests, reports and benchmarks.

SQNR     10 * log10(sum(reference**2) / sum((reference - other)**2))        decibel; 6 dB a bit
error    ||reference - other|| / ||reference||                              relative, Frobenius
"""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(reference: Tensor, other: Tensor) -> float:
    """||reference - other|| / ||reference|| in float64; NaN stays NaN; 0 where both are all zero."""
    reference, other = reference.double(), other.double()
    noise, signal = (reference - other).norm().item(), reference.norm().item()
    if signal == 0.0:
        return noise if noise == 0.0 or math.isnan(noise) else math.inf
    return noise / signal


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in decibel; infinite where they are equal.

    >>> round(sqnr(torch.ones(2), torch.tensor([1.1, 1.0])))
    23
    """
    error = relative_error(reference, other)
    return math.inf if error == 0.0 else -20 * math.log10(error)
