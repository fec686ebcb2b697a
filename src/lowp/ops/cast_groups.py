"""cast_groups: tokens by expert into low precision, by row and by column, for the products of a mixture of experts.

    rows        codes (T, K), scales along K: for a product over K, as `cast` answers them
    columns     codes (K, P), scales along the tokens of one expert: for grad_weight, which sums over them

Groups are ragged, and a tensor core's operands are loaded 128 codes at a time. So the columns move each group to a multiple of
128 places, with zeros below it, and a group of no tokens gets 128 zeros: torch's product wants no empty one. The room for it
does not depend on the data: P = T + 128 E, rounded up.

A stack of weights (E, N, K) is tokens too: E groups of N rows, whose columns are the weight's transpose by expert (`stack_form`).

Legend: T tokens of all experts, E experts, N output channels, K input channels, P = T with the rows of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Format, quantize
from ..numerics.math import quantize_given
from .cast import case_of_both, cast_both, empty_parts
from .operator import define, plain
from .registry import pick

MULTIPLE = 128  # codes of 8 bits: the 128 bytes of a row that the copy engine swizzles at once


def cast_groups(x_TK: Tensor, offs: Tensor, rows: str | None, columns: str) -> list[Tensor]:
    """Quantize tokens by expert: as they lie, and the transpose along the tokens of each expert.

    Args:
        x_TK: (T, K), sorted by expert. offs: (E,) int32, where each expert's tokens end. rows: spelling of the format of x_TK, or
            None. columns: of the transpose: a scale by "row" (here: for each expert and column), or blocks of one row that
            divide 128.

    Returns:
        The tensors of rows, if asked for; then codes (K, P); scales (K, E) by row, or (K, P / block); and (E,) int32, where each
        group ends in P. What stands behind the last group is undefined.
    """
    args = (x_TK, offs, rows or "", columns)
    made: list[Tensor] = _cast_groups(*args) if plain(x_TK) else torch.ops.lowp.cast_groups(*args)
    return made


def stack_form(w_ENK: Tensor, fmt: str) -> list[Tensor]:
    """A stack of matrices by row, each by itself, in whichever order its numbers lie.

    Returns:
        Codes (E, N, K) and scales (E, N, 1) by row, or (E, N, K / block); views where the stack lies transposed.
    """
    experts, rows, columns = w_ENK.shape
    w_ENK = w_ENK.detach()
    if w_ENK.stride(-1) == 1 or w_ENK.stride(-2) != 1:
        made = cast_both(w_ENK.reshape(-1, columns), fmt, None)
        return [tensor.view(experts, rows, -1) for tensor in made]
    offs = torch.arange(1, experts + 1, dtype=torch.int32, device=w_ENK.device) * columns
    codes, scales, _ = cast_groups(w_ENK.mT.reshape(-1, rows), offs, None, fmt)
    each = filled(columns)
    if Format.parse(fmt).block == "row":
        scales_EN1 = scales.t().unsqueeze(-1)
    else:
        groups, count = each * scales.shape[1] // codes.shape[1], columns * scales.shape[1] // codes.shape[1]
        scales_EN1 = scales.as_strided((experts, rows, count), (groups, scales.shape[1], 1))
    return [codes.as_strided((experts, rows, columns), (each, codes.shape[1], 1)), scales_EN1]


def filled(tokens: int) -> int:
    """The places of a group of so many tokens."""
    return max((tokens + MULTIPLE - 1) // MULTIPLE, 1) * MULTIPLE


def room(tokens: int, experts: int) -> int:
    """P: places for every group, whatever their sizes."""
    return (tokens + MULTIPLE - 1) // MULTIPLE * MULTIPLE + experts * MULTIPLE


def _cast_groups(x_TK: Tensor, offs: Tensor, rows: str, columns: str) -> list[Tensor]:
    device = x_TK.device
    case = case_of_both("cast_groups", rows, columns, device.type, device.index, x_TK.dtype, x_TK.shape[1])
    made: list[Tensor] = pick(case).run(x_TK, offs, rows, columns)
    return made


def _fake(x_TK: Tensor, offs: Tensor, rows: str, columns: str) -> list[Tensor]:
    (tokens, width), experts, fmt = x_TK.shape, offs.shape[0], Format.parse(columns)
    made = empty_parts(x_TK, Format.parse(rows), (tokens, width)) if rows else []
    codes, scales = empty_parts(x_TK, fmt, (width, room(tokens, experts)))
    if fmt.block == "row":
        scales = x_TK.new_empty((experts, width), dtype=scales.dtype).t()
    return [*made, codes, scales, torch.empty_like(offs)]


define("cast_groups", "(Tensor x, Tensor offs, str rows, str columns) -> Tensor[]", _cast_groups, _fake)


# -- the reference ----------------------------------------------------------------------------------------------------


def placed(x_TK: Tensor, offs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, K) with the groups at multiples; the expert of each row, E for none; and where each group ends."""
    (tokens, width), experts = x_TK.shape, offs.shape[0]
    sizes = torch.diff(offs, prepend=offs.new_zeros(1))
    taken = ((sizes + MULTIPLE - 1) // MULTIPLE).clamp(min=1) * MULTIPLE
    ends, places = taken.cumsum(0).to(torch.int32), room(tokens, experts)
    t = torch.arange(tokens, device=x_TK.device, dtype=torch.int32)
    expert_T = torch.searchsorted(offs, t, right=True)
    within = expert_T.clamp(max=experts - 1)
    to = torch.where(
        expert_T < experts, t - (offs - sizes)[within] + (ends - taken)[within], places
    )  # nobody's go below
    out = x_TK.new_zeros((places + 1, width)).index_copy(0, to.long(), x_TK)[:places]
    rows = torch.arange(places, device=x_TK.device, dtype=torch.int32)
    return out, torch.searchsorted(ends, rows, right=True), ends


def reference(x_TK: Tensor, offs: Tensor, rows: str, columns: str) -> list[Tensor]:
    """The meaning of cast_groups."""
    parsed, experts = Format.parse(columns), offs.shape[0]
    made = list(quantize(x_TK, Format.parse(rows)).tensors().values()) if rows else []
    x_PK, expert_P, ends = placed(x_TK, offs)
    if parsed.block != "row":
        return [*made, *quantize(x_PK.t().contiguous(), parsed).tensors().values(), ends]
    index = expert_P.clamp(max=experts - 1)[:, None].expand_as(x_PK)
    zeros = torch.zeros((experts, x_PK.shape[1]), device=x_PK.device)
    amax_EK = zeros.scatter_reduce(0, index, x_PK.to(torch.float32).abs(), "amax")
    scale_EK = quantize(amax_EK.reshape(-1, 1), parsed).scale
    assert scale_EK is not None
    scale_EK = scale_EK.reshape(amax_EK.shape)
    alone = Format.parse(columns.replace("/row", "/1x1"))
    codes = quantize_given(x_PK, alone, scale_EK.to(torch.float32)[index[:, 0]])
    return [*made, codes.qdata.t().contiguous(), scale_EK.t(), ends]
