"""Tokens by expert into low precision, as they lie and transposed, with scales by row: x is read twice, each form written once.

    amaxes   the largest magnitude of each token, and of each column in each expert, as maxima of bits (NaN is the largest)
    codes    both forms of a square from those; the scales beside

A program holds 128 places of P, which belong to one expert: it finds the expert from where the groups end. Places behind the last
group hold tokens that belong to nobody, whose rows are written all the same.

Legend: T tokens, K columns, E experts, P places; S = 128 places of a program, C columns that it holds at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import ELEMENTS, Format
from ...ops.cast import cast_both
from ...ops.cast_groups import MULTIPLE, placed, reference, room
from ...ops.registry import Case, Kernel, device_capability
from . import why_not_portable
from .cast import constants_of
from .cast_both import why_not_form
from .launch import aligned, begin, launch
from .rounding import bits_of, encode, float_of, quotient, stored_scale, widen
from .scales import power_scale

_AMAXES, _CODES = (64, 4, 4), (128, 4, 8)  # columns at a time, programs side by side over the columns, warps


@triton.jit
def _group_of(offs_ptr, tile, T, E, LANES: tl.constexpr, S: tl.constexpr):
    """Of a tile of S places: its expert (E: nobody's tokens; more: none at all), its first token and the expert's last, whether
    it is the expert's first tile, and for each expert the tile that its places end in front of."""
    lane = tl.arange(0, LANES)
    end = tl.load(offs_ptr + lane, mask=lane < E, other=0)
    end = tl.where(lane == E, T, end)
    start = tl.load(offs_ptr + lane - 1, mask=(lane > 0) & (lane <= E), other=0)
    tiles = (end - start + S - 1) // S
    tiles = tl.where(lane < E, tl.maximum(tiles, 1), tl.where(lane == E, tiles, 0))
    below = tl.cumsum(tiles, 0)
    expert = tl.sum((below <= tile).to(tl.int32), 0)
    mine = lane == expert
    skipped = (tile - tl.sum(tl.where(mine, below - tiles, 0), 0)) * S
    first = tl.sum(tl.where(mine, start, 0), 0) + skipped
    last = tl.sum(tl.where(mine, end, 0), 0)
    return expert, first, last, skipped == 0, below


@triton.jit(do_not_specialize=["T", "E"], do_not_specialize_on_alignment=["offs_ptr"])
def _group_amaxes_kernel(
    x_ptr, offs_ptr, row_ptr, column_ptr, ends_ptr, T, K, E, x_stride, S: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The largest magnitudes, as bits, and where the groups end in P."""
    begin(EARLY)
    expert, first, last, _begins, below = _group_of(offs_ptr, tl.program_id(1), T, E, LANES, S)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        lane = tl.arange(0, LANES)
        tl.store(ends_ptr + lane, below * S, mask=lane < E)
    if first < last:
        m = first + tl.arange(0, S)
        largest = tl.zeros((S,), dtype=tl.int32)
        width = tl.where(expert < E, K, 0)  # nobody's tokens have no columns
        for start in range(tl.program_id(0) * C, K, SPLIT * C):
            k = start + tl.arange(0, C)
            inside = (m[:, None] < last) & (k[None, :] < K)
            x = widen(tl.load(x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0))
            bits = bits_of(x) & 0x7FFFFFFF
            tl.atomic_max(column_ptr + expert * K + k, tl.max(bits, axis=0), mask=k < width, sem="relaxed")
            if ROWS:
                largest = tl.maximum(largest, tl.max(bits, axis=1))
        if ROWS:
            tl.atomic_max(row_ptr + m, largest, mask=m < last, sem="relaxed")


@triton.jit
def _scaled(
    amax, KIND: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, EMAX: tl.constexpr,
    ABOVE: tl.constexpr,
):  # fmt: skip
    """A scale as it is stored, its value and its inverse."""
    if SCALE == 4:
        stored, value, inverse = power_scale(amax, RULE, EMAX, ABOVE, KIND == 0)
    else:
        stored, value, inverse = stored_scale(tl.div_rn(amax, LARGEST), 1.0, SCALE)
    return stored, value, inverse


@triton.jit
def _coded(
    x, value, inverse, KIND: tl.constexpr, MBITS: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr,
    NAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    if RECIPROCAL:
        q = x * inverse
    else:
        q = quotient(x, value, False)
    code, _number = encode(q, KIND, MBITS, LOWEST, TOP, BITS, NAN, QMIN, QMAX)
    return code


@triton.jit(do_not_specialize=["T", "E"], do_not_specialize_on_alignment=["offs_ptr"])
def _group_codes_kernel(
    x_ptr, offs_ptr, row_ptr, column_ptr, r_ptr, rs_ptr, c_ptr, cs_ptr, T, K, E, P, x_stride, S: tl.constexpr, C: tl.constexpr,
    SPLIT: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, RF: tl.constexpr, CF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Codes and scales. RF and CF: what `_form` says of the formats."""
    begin(EARLY)
    tile = tl.program_id(1)
    expert, first, last, begins, _below = _group_of(offs_ptr, tile, T, E, LANES, S)
    if expert <= E:
        m = first + tl.arange(0, S)
        p = tile * S + tl.arange(0, S)
        width = tl.where(begins, K, 0)  # the first tile of a group writes its scales
        if ROWS:
            row_amax = float_of(tl.load(row_ptr + m, mask=m < last, other=0))
            row_scale, row_value, row_inverse = _scaled(row_amax, RF[0], RF[8], RF[10], RF[11], RF[12], RF[13])
            if tl.program_id(0) == 0:
                tl.store(rs_ptr + m, row_scale, mask=m < last)
        for start in range(tl.program_id(0) * C, K, SPLIT * C):
            k = start + tl.arange(0, C)
            inside = (m[:, None] < last) & (k[None, :] < K)
            at = m[:, None].to(tl.int64)
            x = widen(tl.load(x_ptr + at * x_stride + k[None, :], mask=inside, other=0.0))
            if ROWS:
                row_code = _coded(
                    x,
                    row_value[:, None],
                    row_inverse[:, None],
                    RF[0],
                    RF[1],
                    RF[2],
                    RF[3],
                    RF[4],
                    RF[5],
                    RF[6],
                    RF[7],
                    RF[9],
                )
                tl.store(r_ptr + at * K + k[None, :], row_code, mask=inside)
            if expert < E:
                amax = float_of(tl.load(column_ptr + expert * K + k, mask=k < K, other=0))
                stored, value, inverse = _scaled(amax, CF[0], CF[8], CF[10], CF[11], CF[12], CF[13])
                tl.store(cs_ptr + expert * K + k, stored, mask=k < width)
                code = _coded(
                    x, value[None, :], inverse[None, :], CF[0], CF[1], CF[2], CF[3], CF[4], CF[5], CF[6], CF[7], CF[9]
                )
                to = c_ptr + k[:, None].to(tl.int64) * P + p[None, :]
                tl.store(to, tl.trans(code), mask=k[:, None] < K)


@functools.cache
def _form(spelling: str, sm: int) -> tuple[Any, ...]:
    """KIND, MBITS, LOWEST, TOP, BITS, NAN, QMIN, QMAX, LARGEST, RECIPROCAL, SCALE, RULE, EMAX, ABOVE of a format."""
    every = constants_of(Format.parse(spelling), sm)
    return (*every[:10], *every[11:15])  # no zero points, no scales of scales


def _run(x_TK: Tensor, offs: Tensor, rows: str, columns: str) -> list[Tensor]:
    (tokens, width), experts, device = x_TK.shape, offs.shape[0], x_TK.device
    if not x_TK.numel():
        return reference(x_TK, offs, rows, columns)
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    offs = offs.contiguous()
    sm, places = device_capability(device.type, device.index), room(tokens, experts)
    row_fmt, column_fmt = Format.parse(rows or columns), Format.parse(columns)
    amaxes = torch.zeros((experts * width + (tokens if rows else 0),), dtype=torch.int32, device=device)
    of_columns, of_rows = amaxes[: experts * width], amaxes[experts * width :]
    ends = torch.empty_like(offs)
    made = [*(_empty(row_fmt, (tokens, width), (tokens, 1), device) if rows else (x_TK, x_TK))]
    made += _empty(column_fmt, (width, places), (experts, width), device)
    lanes, tiles = max(16, triton.next_power_of_2(experts + 1)), places // MULTIPLE + 1
    key = (lanes, bool(rows), x_TK.dtype, aligned(x_TK), x_TK.stride(0) % 16, width % 16, device.index)
    sizes = (tokens, width, experts)
    columns_at, split, warps = _AMAXES
    tiled = (MULTIPLE, columns_at, split, lanes, bool(rows))
    args = (x_TK, offs, of_rows, of_columns, ends, *sizes, x_TK.stride(0))
    launch(_group_amaxes_kernel, ("group amaxes", _AMAXES, *key), (split, tiles, 1), args, lambda: tiled, device, warps)
    columns_at, split, warps = _CODES
    coded = (MULTIPLE, columns_at, split, lanes, bool(rows), _form(rows or columns, sm), _form(columns, sm))
    args = (x_TK, offs, of_rows, of_columns, *made, *sizes, places, x_TK.stride(0))
    launch(
        _group_codes_kernel,
        ("group codes", _CODES, *key, rows, columns),
        (split, tiles, 1),
        args,
        lambda: coded,
        device,
        warps,
    )
    row_form = [made[0].view(row_fmt.element.dtype), made[1].view(ELEMENTS[str(row_fmt.scale)].dtype)] if rows else []
    scales = made[3].view(ELEMENTS[str(column_fmt.scale)].dtype)
    return [*row_form, made[2].view(column_fmt.element.dtype), scales.t(), ends]


def _empty(fmt: Format, shape: tuple[int, int], scales: tuple[int, int], device: torch.device) -> list[Tensor]:
    """Codes and scales in dtypes that Triton's interpreter knows."""
    code = torch.int8 if fmt.element.kind == "int" and fmt.element.qmin < 0 else torch.uint8
    kept = torch.float32 if fmt.scale == "fp32" else torch.uint8
    return [torch.empty(shape, dtype=code, device=device), torch.empty(scales, dtype=kept, device=device)]


def _why_not(case: Case) -> str:
    if refused := why_not_portable(case):
        return refused
    for fmt in map(Format.parse, case.scheme.split("@")):
        element = fmt.element
        if fmt.block != "row" or fmt.scale not in ("fp32", "e8m0") or fmt.zero_point:
            return f"wants a scale in fp32 or e8m0 for each row and no zero point, got {fmt}"
        if element.kind != "float" or element.bits != 8 or element.specials in ("fnuz", "nan"):
            return f"wants e4m3 or e5m2, got {element.name}"
    return "" if case.shape[-1] % 16 == 0 else f"wants K in multiples of 16, got {case.shape[-1]}"


def _run_blocks(x_TK: Tensor, offs: Tensor, rows: str, columns: str) -> list[Tensor]:
    """Scales of blocks: the tokens moved to their places, then cast as any matrix is."""
    x_PK, _, ends = placed(x_TK, offs)
    return [*(cast_both(x_TK, rows, None) if rows else []), *cast_both(x_PK, None, columns), ends]


def _why_not_blocks(case: Case) -> str:
    formats = [Format.parse(form) for form in case.scheme.split("@")]
    if not formats[-1].block.startswith("1x"):
        return f"wants columns in blocks of a row, got {formats[-1]}"
    return why_not_portable(case) or why_not_form(formats[-1])


KERNELS = (
    Kernel(
        op="cast_groups", name="cast_groups", rank=50, layout="", why_not=_why_not, run=_run,
        how=lambda case: "amax by token and by column of each expert, then codes of both forms in registers",
        cases=("e4m3/row*e8m0@e4m3/row*e8m0", "e4m3/row@e4m3/row", "e5m2/row@e4m3/row", "e4m3/row*e8m0"),
        about="tokens by expert and their transpose cast together, in Triton",
    ),
    Kernel(
        op="cast_groups", name="cast_placed", rank=60, layout="", why_not=_why_not_blocks, run=_run_blocks,
        how=lambda case: "tokens moved to their places by torch, then amax, scales and codes in registers",
        cases=("e4m3/1x32*e8m0@e4m3/1x32*e8m0", "e4m3/1x128"),
        about="tokens by expert moved by torch, then cast in blocks in Triton",
    ),
)  # fmt: skip
