"""What calibration keeps of a layer's inputs: sums over tokens, so that batches and ranks add up.

The squared error that rounding a weight makes in a layer's output is a quadratic form of one K x K matrix:

    sum over tokens || x (W - Q)^T ||^2  =  trace((W - Q) H (W - Q)^T)          H = sum x x^T

So H is all that methods for weights need, whatever the number of tokens: GPTQ, AWQ's search, learned rounding and the error in
the report all read it, and no activation is kept. Beside it stand the sums of |x| and the largest |x| of each column (AWQ,
SmoothQuant), and for a static scale of the activation a histogram of |x| over all bfloat16 magnitudes: 32768 counts, exact for
bf16 inputs, the same whatever the order of the batches.

Sources: Frantar et al., GPTQ, arXiv 2210.17323, section 3; Hassibi and Stork, Optimal Brain Surgeon, 1993.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import Format, Parts, dequantize
from ..numerics.math import quantize_given

STATIC = ("minmax", "average", "percentile", "mse")
_MAGNITUDES = 1 << 15  # bfloat16 without its sign
_MOMENTUM = 0.9  # of the moving average: about the last ten batches
_PERCENTILE = 0.9999  # of all |x|: one number in 10000 is clamped
_ROWS = 1 << 13  # tokens whose product enters H at once, on a CPU: bounds the float32 copy


@dataclass
class Statistics:
    """The inputs of one matrix (N, K), summed over tokens.

    Args:
        columns: K. tokens: rows of x seen. hessian_KK: sum of x x^T, float32. sum_K: of |x|. amax_K: the largest |x|.
        average: moving average of the batches' largest |x|. histogram: counts of |x| by the bits of bfloat16, or None.

    >>> statistics = Statistics.empty(2)
    >>> statistics.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> statistics.hessian_KK
    tensor([[10.,  2.],
            [ 2.,  4.]])
    """

    columns: int
    tokens: int
    hessian_KK: Tensor | None
    sum_K: Tensor
    amax_K: Tensor
    average: Tensor
    histogram: Tensor | None

    @classmethod
    def empty(
        cls, columns: int, *, hessian: bool = True, histogram: bool = False, device: torch.device | str = "cpu"
    ) -> Statistics:
        """Nothing seen yet."""
        return cls(
            columns=columns,
            tokens=0,
            hessian_KK=torch.zeros(columns, columns, device=device) if hessian else None,
            sum_K=torch.zeros(columns, device=device),
            amax_K=torch.zeros(columns, device=device),
            average=torch.zeros((), device=device),
            histogram=torch.zeros(_MAGNITUDES, dtype=torch.int64, device=device) if histogram else None,
        )

    def update(self, x: Tensor) -> None:
        """Add inputs (..., K) of any float dtype."""
        x_MK = x.detach().reshape(-1, self.columns)
        if not len(x_MK):
            return
        magnitudes = x_MK.abs()
        if self.hessian_KK is not None:
            add_squares(self.hessian_KK, x_MK)
        self.sum_K += magnitudes.sum(dim=0, dtype=torch.float32)
        amax_K = magnitudes.amax(dim=0).to(torch.float32)
        self.amax_K = torch.maximum(self.amax_K, amax_K)
        self.average = amax_K.max() if not self.tokens else self.average.lerp(amax_K.max(), 1 - _MOMENTUM)
        if self.histogram is not None:
            bits = magnitudes.to(torch.bfloat16).view(torch.int16).flatten().to(torch.int64)
            self.histogram += torch.bincount(bits.clamp_(0, _MAGNITUDES - 1), minlength=_MAGNITUDES)
        self.tokens += len(x_MK)

    def scaled(self, factor_K: Tensor) -> Statistics:
        """The statistics of x * factor; the histogram and the average, which cannot follow, are dropped."""
        factor = factor_K.to(self.sum_K)
        hessian = None if self.hessian_KK is None else self.hessian_KK * factor * factor.unsqueeze(1)
        return dataclasses.replace(
            self,
            hessian_KK=hessian,
            sum_K=self.sum_K * factor.abs(),
            amax_K=self.amax_K * factor.abs(),
            average=(self.amax_K * factor.abs()).max(),
            histogram=None,
        )

    def importance_K(self) -> Tensor | None:
        """The mean square of each column, what an error there counts; None where nothing was seen.

        A hundredth of the mean is added: a column that no token has reached may be reached later.
        """
        if self.hessian_KK is None or not self.tokens:
            return None
        squares_K = self.hessian_KK.diagonal() / self.tokens
        return squares_K + 0.01 * squares_K.mean()

    def output_squares(self, weight: Tensor, values: Tensor) -> tuple[float, float]:
        """||x (W - Q)^T||^2 and ||x W^T||^2 over the tokens seen."""
        if self.hessian_KK is None:
            return math.nan, math.nan
        weight = weight.to(torch.float32)
        noise, signal = (squared_output(w, self.hessian_KK) for w in (weight - values, weight))
        return max(noise, 0.0), max(signal, 0.0)

    def output_error(self, weight: Tensor, values: Tensor) -> float:
        """||x (W - Q)^T|| / ||x W^T|| over the tokens seen; NaN where there were none."""
        noise, signal = self.output_squares(weight, values)
        return math.sqrt(noise / signal) if signal > 0 else (0.0 if self.tokens else math.nan)

    def reduce(self) -> None:
        """Sum over the ranks of torch.distributed's default group; all of them then hold the same."""
        import torch.distributed as dist

        tokens = torch.tensor([float(self.tokens)], dtype=torch.float64, device=self.sum_K.device)
        average = (self.average.double() * tokens).reshape(1)
        for tensor in (self.hessian_KK, self.sum_K, self.histogram, tokens, average):
            if tensor is not None:
                dist.all_reduce(tensor)
        dist.all_reduce(self.amax_K, op=dist.ReduceOp.MAX)
        self.tokens = int(tokens.item())
        self.average = (average / tokens.clamp(min=1)).float().reshape(())


def add_squares(hessian_KK: Tensor, x_MK: Tensor) -> None:
    """hessian += x^T x, summed in float32."""
    if x_MK.is_cuda and x_MK.dtype in (torch.bfloat16, torch.float16):
        hessian_KK += torch.mm(x_MK.T, x_MK, out_dtype=torch.float32)  # 16-bit tensor cores: each product is exact
        return
    for rows in x_MK.split(_ROWS):
        rows = rows.to(torch.float32)
        hessian_KK.addmm_(rows.T, rows)


def squared_output(error_NK: Tensor, hessian_KK: Tensor) -> float:
    """trace(E H E^T): the squared norm of x E^T over the tokens in H."""
    return sum(float(((rows @ hessian_KK) * rows).sum(dtype=torch.float64)) for rows in error_NK.split(1 << 12))


def static_scale(statistics: Statistics, fmt: Format, how: str) -> Tensor:
    """One scale for an activation whatever the token, from what calibration has seen.

    Args:
        statistics: with a histogram for "percentile" and "mse". fmt: the activation's format, symmetric.
        how: "minmax" (nothing seen is clamped), "average" (moving average of the batches' largest), "percentile" (of |x|) or
            "mse" (the range of least squared error).

    Returns:
        (), float32.

    Raises:
        MisfitError: a format with a zero point, or one that takes no scale.
    """
    if fmt.zero_point or fmt.is_identity or fmt.nested is not None:
        raise MisfitError(f"a static scale wants a symmetric activation format such as int8/tensor, got {fmt}.")
    top = float(statistics.amax_K.max()) or 1.0  # nothing but zeros: any scale does
    if how == "average":
        top = float(statistics.average)
    elif how in ("percentile", "mse"):
        assert statistics.histogram is not None
        counts = statistics.histogram.to(torch.float64)
        values = torch.arange(_MAGNITUDES, device=counts.device).to(torch.int16).view(torch.bfloat16).to(torch.float32)
        if how == "percentile":
            share = counts.cumsum(0) / counts.sum().clamp(min=1)
            top = min(top, float(values[int((share < _PERCENTILE).sum())]))
        else:
            top *= _best_share(values, counts, fmt, top)
    return torch.tensor(max(top, torch.finfo(torch.float32).tiny) / fmt.element.largest, device=statistics.sum_K.device)


def _best_share(values: Tensor, counts: Tensor, fmt: Format, top: float) -> float:
    """The share of the range with the least squared error over the histogram."""
    seen = counts > 0
    row, weight = values[seen].unsqueeze(0), counts[seen]
    by_tensor = Format.parse(f"{fmt.element.name}/tensor")
    errors = []
    shares = [0.02 * step for step in range(50, 4, -1)]
    for share in shares:
        scale = torch.full((1, 1), max(top * share / fmt.element.largest, 1e-30), device=values.device)
        parts: Parts = quantize_given(row, by_tensor, scale)
        errors.append(float(((dequantize(parts, by_tensor) - row).double().square() * weight).sum()))
    return shares[errors.index(min(errors))]
