"""round_columns: encode a few columns of a weight one after the other, each making up for the error of those before it.

The inner loop of GPTQ (`lowp/methods/gptq.py`). The columns stand as rows here, left_BN = W^T in the order in which they are
rounded; U is upper triangular, and column j lies in block places[j] // bk of the format:

    code_j = nearest(left_j)        e_j = (left_j - decode(code_j)) * (1 / U_jj)
    left_k = left_k - U_jk e_j      for all k > j, product and difference rounded each for itself

Rows of the weight do not depend on one another, so a kernel may take a few of them and all of the columns at once. The codes and
errors of every kernel are the reference's own, bit for bit, for finite numbers (calibration lets no others come this far): that
is why no multiply-add is fused, here or there. What a product of matrices makes of the errors between two steps is each device's
own, and so may be codes behind the first step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import Format, Parts
from ..numerics.grid import Grid
from ..numerics.math import grid_of_parts
from .registry import Case, device_capability, pick


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """How the columns of a weight (N, K) are encoded.

    Args:
        fmt: the format. block: (bn, bk) of it. grid: its tensors are (K/bk, N/bn), contiguous. rows: N.
    """

    fmt: Format
    block: tuple[int, int]
    grid: Grid
    rows: int

    @classmethod
    def of(cls, parts: Parts, fmt: Format, shape: tuple[int, int]) -> Columns:
        """From the parts of a weight of that shape, whose scales and zero points are kept."""
        grid = grid_of_parts(parts, fmt).map(lambda tensor: tensor.squeeze(3).squeeze(1).T.contiguous())
        return cls(fmt=fmt, block=fmt.block_dims(shape), grid=grid, rows=shape[0])

    def of_block(self, index: int) -> Grid:
        """The grid of one block of columns, (N/bn, 1)."""
        return self.grid.map(lambda tensor: tensor[index].unsqueeze(1))


def round_columns(left_BN: Tensor, factor_BB: Tensor, places_B: Tensor, columns: Columns, codes_KN: Tensor) -> Tensor:
    """Round B columns.

    Args:
        left_BN: float32, what is left to be rounded, contiguous; it holds nothing of use afterwards.
        factor_BB: U, upper triangular, float32, its last axis contiguous. places_B: int64, where each column lies in the weight.
        columns: how to encode. codes_KN: the codes of all columns; those at `places` are written.

    Returns:
        (B, N), float32: the error of each column, for the columns behind them.
    """
    case = Case(
        op="round_columns",
        scheme=str(columns.fmt),
        device=left_BN.device.type,
        sm=device_capability(left_BN.device.type, left_BN.device.index),
        dtype="float32",
        shape=(columns.rows, codes_KN.shape[0]),
    )
    errors_BN: Tensor = pick(case).run(left_BN, factor_BB, places_B, columns, codes_KN)
    return errors_BN


def reference(left_BN: Tensor, factor_BB: Tensor, places_B: Tensor, columns: Columns, codes_KN: Tensor) -> Tensor:
    """The meaning of round_columns: a column at a time."""
    bn, bk = columns.block
    errors_BN, correction_BN = torch.empty_like(left_BN), torch.empty_like(left_BN)
    steps_B = factor_BB.diagonal().reciprocal()
    for j, place in enumerate(places_B.tolist()):
        grid = columns.of_block(place // bk)
        codes = grid.encode(left_BN[j].view(-1, bn))
        torch.mul(left_BN[j] - grid.decode(codes).view(-1), steps_B[j], out=errors_BN[j])
        behind = torch.mul(factor_BB[j, j + 1 :, None], errors_BN[j], out=correction_BN[j + 1 :])
        left_BN[j + 1 :].sub_(behind)
        codes_KN[place] = codes.view(-1)
    return errors_BN
