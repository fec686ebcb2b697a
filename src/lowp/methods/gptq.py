"""GPTQ: round one column after the other, and let the columns that are still free make up for the error.

With H = sum x x^T over the calibration tokens, the error of a layer's output is trace((W - Q) H (W - Q)^T). Once column j is
rounded, the best correction of the columns after it is known in closed form. U is the upper triangular factor with H^-1 = U^T U:

    e_j   = (w_j - q_j) / U_jj
    W_k  <- W_k - e_j U_jk                for all k > j

Columns are worked on in blocks: within one the correction is applied column by column, behind it by one matrix product. Three
things decide how well it goes:

    order      columns with the largest H_jj first (act-order), as long as there are many others to correct them. A block's scale
               is chosen before (static groups), so the order changes no layout: codes lie where they always lie.
    scales     for each block the range of least squared error, weighed by H_jj: what `mse` does, counted where it matters
    damping    H + d mean(diag H) I. Where Cholesky's factorisation fails, d grows tenfold until it succeeds.

Columns that no token has reached (H_jj = 0) are rounded to nearest. Encoding and decoding are `numerics`' grid, so every format
works: integers with and without zero points, float8, float6, MX, NVFP4, NF4. W is kept as W^T, so that a column is contiguous.

Source: Frantar et al., GPTQ, arXiv 2210.17323. The factor comes from one Cholesky factorisation: with J reversing the order,
J H J = L L^T gives H = A A^T for the upper triangular A = J L J, hence H^-1 = A^-T A^-1 and U = A^-1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import Format, Parts, quantize
from ..ops.columns import Columns, round_columns
from ..quantize.method import Method, register
from ..quantize.statistics import Statistics

_BLOCK = 128  # columns whose corrections reach the columns behind them in one product


def gptq(
    weight: Tensor,
    statistics: Statistics | None,
    fmt: Format,
    *,
    act_order: bool = True,
    damp: float = 0.01,
    search: bool = True,
) -> Parts:
    """Quantize a weight by GPTQ.

    Args:
        weight: (N, K), float. statistics: of its inputs. fmt: any format but a plain float.
        act_order: most important columns first. damp: share of the mean of H's diagonal that is added to it.
        search: choose each block's range by weighed squared error; else by the format's own rule.

    Returns:
        Parts. Without inputs: rounded to nearest.

    >>> seen = Statistics.empty(64)
    >>> seen.update(torch.randn(256, 64))
    >>> gptq(torch.randn(8, 64), seen, Format.parse("int4/1x32*bf16")).scale.shape
    torch.Size([8, 2])
    """
    importance = None if statistics is None else statistics.importance_K()
    if fmt.is_identity or importance is None or not weight.numel():
        return quantize(weight, fmt)
    assert statistics is not None and statistics.hessian_KK is not None
    weight = weight.to(torch.float32)
    parts = quantize(weight, fmt.with_rule("mse"), importance=importance) if search else quantize(weight, fmt)
    order = importance.argsort(descending=True, stable=True) if act_order else None
    factor_KK = inverse_factor(statistics.hessian_KK, damp, order)
    codes_KN = _rounded(weight, Columns.of(parts, fmt, (weight.shape[0], weight.shape[1])), factor_KK, order)
    return parts.replace(qdata=codes_KN.T.contiguous())


def inverse_factor(hessian_KK: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """The upper triangular U with (H + d mean(diag H) I)^-1 = U^T U, its columns in the given order.

    Args:
        hessian_KK: symmetric, positive semidefinite; rows and columns of zeros count as 1 on the diagonal.
        damp: d; tenfold as long as the factorisation fails. order: (K,) permutation or None.

    Raises:
        MisfitError: NaN or infinity in H: the layer's inputs were not finite.
    """
    diagonal = hessian_KK.diagonal().to(torch.float64)
    mean = diagonal.mean()
    if not bool(mean.isfinite()):
        raise MisfitError("calibration wants finite inputs, got NaN or infinity in a layer's Hessian: repair the data.")
    last_first = torch.arange(len(diagonal), device=diagonal.device).flip(0) if order is None else order.flip(0)
    reversed_KK = hessian_KK[last_first.unsqueeze(1), last_first].to(torch.float64)
    plain = reversed_KK.diagonal().clone()
    plain += (plain == 0) * mean.clamp(min=1.0)
    while True:
        reversed_KK.diagonal().copy_(plain + damp * mean.clamp(min=torch.finfo(torch.float32).tiny))
        lower, failed = torch.linalg.cholesky_ex(reversed_KK)
        if not int(failed):
            break
        damp = max(10 * damp, 1e-6)
    del reversed_KK  # two of these at a time, no more: they decide how wide a layer may be
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.to(torch.float32).flip(0, 1)


def _rounded(weight: Tensor, columns: Columns, factor_KK: Tensor, order: Tensor | None) -> Tensor:
    """The codes (K, N), in the weight's own order of columns."""
    count = weight.shape[1]
    places_K = torch.arange(count, device=weight.device) if order is None else order
    left_KN = weight.T.index_select(0, places_K)
    codes_KN = torch.empty(left_KN.shape, dtype=columns.fmt.element.dtype, device=weight.device)
    for start in range(0, count, _BLOCK):
        own = slice(start, min(start + _BLOCK, count))
        errors_BN = round_columns(left_KN[own], factor_KK[own, own], places_K[own], columns, codes_KN)
        left_KN[own.stop :].addmm_(factor_KK[own, own.stop :].T, errors_BN, alpha=-1)
    return codes_KN


def _why_not(fmt: Format) -> str:
    return f"gptq has nothing to round in {fmt}" if fmt.is_identity else ""


def method(**options: object) -> Method:
    """GPTQ with other options (see `gptq`), for `quantize_(..., method=...)`."""
    return Method(
        name="gptq",
        about="column by column, the columns still free make up for the error (wants data)",
        run=functools.partial(gptq, **options),  # type: ignore[arg-type]
        why_not=_why_not,
        wants_data=True,
        options=repr(sorted(options.items())) if options else "",
    )


register(method())
