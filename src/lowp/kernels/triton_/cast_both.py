"""A matrix and its transpose into low precision, together: what a linear layer's training asks of each of its tensors.

    rows      codes (M, K), scales along K: for the product over K        columns     codes (K, M), scales along M: over M

A program holds a tile of the matrix. Scales of blocks (1x32, 1x128, 128x128) are found inside of it, so x is read once and
both forms are written: 2 bytes in and 2 out for float8. One scale for a row, a column or the matrix needs magnitudes from other
tiles: a launch before this one finds all three at once, as maxima of bits (NaN is the largest of them), and x is read twice.

The bytes are those of `numerics.quantize`, exactly; rounded at random (integers alone) they are not compared but unbiased:
floor(q), or one more where the random number of this place is below q - floor(q). That number is a hash of place and seed, 12
instructions where Philox takes over a hundred: a gradient's rounding asks for numbers without bias and without a pattern that
its neighbours share, not for a generator's guarantees.

Legend: M rows, K columns, TM x TK a tile, G numbers along the summed axis that share a scale.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import ELEMENTS, Format
from ...ops.cast import both_reference
from ...ops.registry import Case, Kernel, device_capability
from . import why_not_portable
from .cast import cast_tensors, constants_of, plan_of, why_not_format
from .launch import aligned, begin, capturing, launch
from .rounding import bits_of, encode, float_of, quotient, stored_scale, widen
from .scales import power_scale

_BLOCKS, _ROW, _TENSOR, _SQUARE = 0, 1, 2, 3  # who shares a scale: G numbers, a row, all, or a square
_LONGEST = 128  # numbers along an axis that share a scale inside a tile
_AMAX_TILE = (32, 128, 8)  # rows and columns of a tile, and how many of them a program looks at


@triton.jit
def _tile(x_ptr, m, k, M, K, x_stride):
    inside = (m[:, None] < M) & (k[None, :] < K)
    return widen(tl.load(x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0))


@triton.jit(do_not_specialize=["M"])
def _amaxes_kernel(
    x_ptr, row_ptr, column_ptr, M, K, x_stride, TM: tl.constexpr, TK: tl.constexpr, TIMES: tl.constexpr, ROW: tl.constexpr,
    COLUMN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The largest magnitudes, as bits: of rows and columns (1), or of all (2), where they are asked for.

    A program goes down TIMES tiles, the next on its way while it looks at one; what columns and the whole need leaves it once."""
    begin(EARLY)
    k = tl.program_id(0) * TK + tl.arange(0, TK)
    m = tl.program_id(1) * TIMES * TM + tl.arange(0, TM)
    end = tl.minimum(M, (tl.program_id(1) + 1) * TIMES * TM)
    largest = tl.zeros((TM, TK), tl.int32)
    coming = _tile(x_ptr, m, k, end, K, x_stride)
    for _ in range(TIMES):
        bits = bits_of(coming) & 0x7FFFFFFF
        coming = _tile(x_ptr, m + TM, k, end, K, x_stride)
        largest = tl.maximum(largest, bits)
        if ROW == 1:
            tl.atomic_max(row_ptr + m, tl.max(bits, axis=1), mask=m < M, sem="relaxed")
        m += TM
    if COLUMN == 1:
        tl.atomic_max(column_ptr + k, tl.max(largest, axis=0), mask=k < K, sem="relaxed")
    if ROW == 2:
        tl.atomic_max(row_ptr, tl.max(largest), sem="relaxed")
    if ROW != 2 and COLUMN == 2:
        tl.atomic_max(column_ptr, tl.max(largest), sem="relaxed")


@triton.jit
def _coded(
    x, amax, given, noise, STATIC: tl.constexpr, RANDOM: tl.constexpr, SHORT: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """Codes of x and the scale as it is stored; amax: magnitudes by scale, in a shape that spreads over x.

    SHORT: x was bf16 or fp16. F: `constants_of` the format."""
    SCALE: tl.constexpr = F[11]
    RECIPROCAL: tl.constexpr = F[9]
    if SCALE == 4:
        stored, value, inverse = power_scale(amax, F[12], F[13], F[14], F[0] == 0)
    else:
        scale = tl.div_rn(amax, F[8])
        if STATIC:
            scale = amax * 0.0 + given
        stored, value, inverse = stored_scale(scale, 1.0, SCALE)
    if RECIPROCAL:
        q = x * inverse
    else:
        q = quotient(x, value, STATIC, SHORT and F[0] != 0)
    if RANDOM:
        low = tl.floor(q)
        q = tl.where(noise < q - low, low + 1.0, low)
    code, _number = encode(q, F[0], F[1], F[2], F[3], F[4], F[5], F[6], F[7])
    return code, stored


@triton.jit
def _noise(seed, at):
    """Numbers in [0, 1), by place: multiply and fold, twice, by the constants of Wellons' search for little bias (lowbias32)."""
    h = at.to(tl.uint32) ^ (seed.to(tl.uint32) * 2654435769)  # 2**32 / golden ratio
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B + seed.to(tl.uint32)
    h = h ^ (h >> 16)
    return float_of((h >> 9).to(tl.int32) | 0x3F800000) - 1.0


@triton.jit
def _codes_of(
    x, line, across, lines, width, row, column, amax_ptr, given, scale_ptr, noise, WHO: tl.constexpr, G: tl.constexpr,
    STATIC: tl.constexpr, RANDOM: tl.constexpr, SHORT: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Codes of a tile whose scales lie along its rows; the scales are stored.

    line, across: where the tile stands in a matrix (lines, width); row, column: which tile it is."""
    LINES: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    one = tl.zeros((1, 1), tl.int32)
    bits = bits_of(x) & 0x7FFFFFFF
    if WHO == 0:
        PARTS: tl.constexpr = WIDTH // G
        part = column * PARTS + tl.arange(0, PARTS)
        amax = float_of(tl.max(tl.reshape(bits, (LINES, PARTS, G)), axis=2, keep_dims=True))
        if RANDOM:
            noise = tl.reshape(noise, (LINES, PARTS, G))
        code, stored = _coded(tl.reshape(x, (LINES, PARTS, G)), amax, given, noise, STATIC, RANDOM, SHORT, F)
        code = tl.reshape(code, (LINES, WIDTH))
        to = scale_ptr + line[:, None].to(tl.int64) * (width // G) + part[None, :]
        tl.store(to, tl.reshape(stored, (LINES, PARTS)), mask=(line[:, None] < lines) & (part[None, :] * G < width))
    elif WHO == 1:
        amax = float_of(tl.load(amax_ptr + line, mask=line < lines, other=0))[:, None]
        code, stored = _coded(x, amax, given, noise, STATIC, RANDOM, SHORT, F)
        begins = (line * 0 + column) == 0  # as a vector, which masks want
        tl.store(scale_ptr + line, tl.reshape(stored, (LINES,)), mask=(line < lines) & begins)
    elif WHO == 2:
        amax = float_of(one)
        if not STATIC:
            amax = float_of(tl.load(amax_ptr + one))
        code, stored = _coded(x, amax, given, noise, STATIC, RANDOM, SHORT, F)
        tl.store(scale_ptr + one, stored, mask=(one + row + column) == 0)
    else:
        code, stored = _coded(x, float_of(one + tl.max(bits)), given, noise, STATIC, RANDOM, SHORT, F)
        tl.store(scale_ptr + one + row * tl.cdiv(width, WIDTH) + column, stored)
    return code


@triton.jit(do_not_specialize=["M", "seed"])
def _both_kernel(
    x_ptr, given_ptr, row_ptr, column_ptr, r_ptr, rs_ptr, c_ptr, cs_ptr, M, K, MP, x_stride, seed, TM: tl.constexpr,
    TK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RWHO: tl.constexpr, RG: tl.constexpr,
    CWHO: tl.constexpr, CG: tl.constexpr, STATIC: tl.constexpr, RANDOM: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of both forms. R and C are `constants_of` their formats; MP: M with the rows of zeros below.

    RANDOM: 1, rounded by the number `seed`; 2, by the number that it points to.

    The last tiles go first: the launch before this one has just read them."""
    begin(EARLY)
    row, column = tl.num_programs(1) - 1 - tl.program_id(1), tl.num_programs(0) - 1 - tl.program_id(0)
    m, k = row * TM + tl.arange(0, TM), column * TK + tl.arange(0, TK)
    x = _tile(x_ptr, m, k, M, K, x_stride)
    SHORT: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    given = 1.0
    if STATIC:
        given = widen(tl.load(given_ptr))
    noise = 0.0
    if RANDOM == 2:
        seed = tl.load(seed)
    at = m[:, None].to(tl.int64) * K + k[None, :]
    if ROWS:
        if RANDOM:
            noise = _noise(seed, at)
        code = _codes_of(x, m, k, M, K, row, column, row_ptr, given, rs_ptr, noise, RWHO, RG, STATIC, RANDOM, SHORT, R)
        tl.store(r_ptr + at, code, mask=(m[:, None] < M) & (k[None, :] < K))
    if COLUMNS:
        if RANDOM:
            noise = _noise(seed + 1, m[None, :].to(tl.int64) * K + k[:, None])
        # x is turned, not its codes, even where both forms have the same: a turned tile of bytes came out wrong from Triton 3.6.
        turned = _codes_of(
            tl.trans(x), k, m, K, MP, column, row, column_ptr, given, cs_ptr, noise, CWHO, CG, STATIC, RANDOM, SHORT, C
        )
        to = c_ptr + k[:, None].to(tl.int64) * MP + m[None, :]
        tl.store(to, turned, mask=(k[:, None] < K) & (m[None, :] < MP))


# -- what is fixed for a format ---------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """A format as the kernel takes it: who shares a scale, how many numbers, `constants_of` it, and the dtypes it is kept in."""

    fmt: Format
    who: int
    group: int
    constants: tuple[Any, ...]
    kept: torch.dtype
    scale: torch.dtype


@functools.cache
def _form(spelling: str, sm: int) -> _Form:
    fmt = Format.parse(spelling)
    rows, _, columns = fmt.block.partition("x")
    who = {"row": _ROW, "tensor": _TENSOR}.get(fmt.block, _BLOCKS if rows == "1" else _SQUARE)
    code = torch.int8 if fmt.element.kind == "int" and fmt.element.qmin < 0 else torch.uint8
    return _Form(fmt, who, int(columns or 0), constants_of(fmt, sm), code, ELEMENTS[str(fmt.scale)].dtype)


def why_not_form(fmt: Format) -> str:
    """ "" or why a format is not one that the kernel writes."""
    element = fmt.element
    if (
        element.kind not in ("int", "float")
        or element.bits < 4
        or element.specials in ("fnuz", "nan")
        or element.limits
    ):
        return f"wants integers of 4 to 8 bits, e4m3, e5m2 or MX's small floats, got {element.name}"
    if (
        fmt.zero_point
        or fmt.scale not in ("fp32", "e8m0")
        or fmt.rule not in ("absmax", "floor", "ceil", "rceil", "even")
    ):
        return f"wants scales in fp32 or e8m0 by absmax or a power of two, and no zero point, got {fmt}"
    rows, _, columns = fmt.block.partition("x")
    if columns and rows not in ("1", columns):
        return f"wants scales by tensor, row, a part of a row, or a square, got {fmt}"
    size = int(columns or 16)
    if size < 16 or size > _LONGEST or size & (size - 1):
        return f"wants blocks of 16 to {_LONGEST} numbers, a power of two, got {fmt}"
    return ""


def _run(
    x_MK: Tensor, rows: str, columns: str, act_scale: Tensor | None = None, multiple: int = 1, stochastic: bool = False
) -> list[Tensor]:
    tokens, width = x_MK.shape
    if not x_MK.numel() or (act_scale is not None and act_scale.numel() != 1):
        return both_reference(x_MK, rows, columns, act_scale, multiple, stochastic)
    form = Format.parse(rows or columns)
    if not columns and not stochastic and form.block != "tensor" and not why_not_format(form, width):
        made_rows = cast_tensors(x_MK, plan_of(form, width, x_MK.device), None, act_scale)
        return [made_rows.codes, made_rows.scale]  # a row in registers: x is read once
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    device, height = x_MK.device, -(-tokens // multiple) * multiple
    sm = device_capability(device.type, device.index)
    forms = [_form(rows, sm) if rows else None, _form(columns, sm) if columns else None]
    made = [
        None if form is None else _empty(form, shape, device)
        for form, shape in zip(forms, ((tokens, width), (width, height)), strict=True)
    ]
    tile, warps = _tile_of(forms)
    grid = (-(-width // tile[1]), -(-height // tile[0]), 1)
    amaxes = _amaxes(x_MK, forms) if act_scale is None else (x_MK, x_MK)
    seed = _seed(device) if stochastic else 0
    row_form, column_form = (form or next(other for other in forms if other) for form in forms)
    pointers = [tensor for pair in made for tensor in (pair or (x_MK, x_MK))]
    args = (x_MK, act_scale, *amaxes, *pointers, tokens, width, height, x_MK.stride(0), seed)
    static, random = act_scale is not None, stochastic + isinstance(seed, Tensor)
    key = (
        "both", rows, columns, static, random, x_MK.dtype, aligned(x_MK), _seen(x_MK.stride(0)), _seen(height),
        None if act_scale is None else act_scale.dtype, device.index,
    )  # fmt: skip

    def constants() -> tuple[Any, ...]:
        return (
            *tile, bool(rows), bool(columns), row_form.who if rows else -1, row_form.group,
            column_form.who if columns else -1, column_form.group, static, random,
            row_form.constants, column_form.constants,
        )  # fmt: skip

    launch(_both_kernel, key, grid, args, constants, device, 8 if stochastic else warps)
    return [
        tensor.view(dtype)
        for form, pair in zip(forms, made, strict=True)
        if form is not None and pair is not None
        for tensor, dtype in zip(pair, (form.fmt.element.dtype, form.scale), strict=True)
    ]


def _seed(device: torch.device) -> int | Tensor:
    """Of this cast's noise. In a CUDA graph it is drawn on the device, or every replay would round the same way."""
    if capturing(device):
        return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int32, device=device)
    return int(torch.randint(0, 2**31 - 1, ()))


def _tile_of(forms: list[_Form | None]) -> tuple[tuple[int, int], int]:
    """Rows and columns of a tile, and its warps: a square that shares a scale, or 64 numbers a thread, whole blocks."""
    squares = [form.group for form in forms if form is not None and form.who == _SQUARE]
    if squares:
        return (squares[0], squares[0]), 8 if squares[0] > 64 else 4
    tall = forms[1] is not None and forms[1].group > 64
    return ((128, 128), 8) if tall else ((64, 128), 4)


def _seen(size: int) -> int:
    """What Triton specializes an integer for: 1, a multiple of 16 (of rows: words of 16 bytes are moved), or neither."""
    return 1 if size == 1 else 16 if size % 16 == 0 else 0


def _empty(form: _Form, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales in dtypes that Triton's interpreter knows."""
    scales = (1, 1) if form.who == _TENSOR else form.fmt.scale_shape(shape)
    kept = torch.float32 if form.scale == torch.float32 else torch.uint8
    return torch.empty(shape, dtype=form.kept, device=device), torch.empty(scales, dtype=kept, device=device)


def _amaxes(x_MK: Tensor, forms: list[_Form | None]) -> tuple[Tensor, Tensor]:
    """Magnitudes of rows and columns, or of all, where a scale is shared by more than a tile."""
    who = [form.who if form is not None and form.who in (_ROW, _TENSOR) else 0 for form in forms]
    if not any(who):
        return x_MK, x_MK
    (tokens, width), (tile_m, tile_k, times) = x_MK.shape, _AMAX_TILE
    sizes = [{_ROW: length, _TENSOR: 1}.get(one, 0) for one, length in zip(who, x_MK.shape, strict=True)]
    start = -(-sizes[0] // 4) * 4  # at a multiple of 16 bytes, as a compiled kernel was told that pointers are
    both = torch.zeros(start + sizes[1], dtype=torch.int32, device=x_MK.device)
    of_rows, of_columns = both[: sizes[0]], both[start:]
    if who == [_TENSOR, _TENSOR]:
        of_columns = of_rows
    key = ("amaxes", tuple(who), x_MK.dtype, aligned(x_MK), _seen(x_MK.stride(0)), x_MK.device.index)
    args = (x_MK, of_rows, of_columns, tokens, width, x_MK.stride(0))
    grid = (-(-width // tile_k), -(-tokens // (tile_m * times)), 1)
    launch(_amaxes_kernel, key, grid, args, lambda: (*_AMAX_TILE, *who), x_MK.device, 4)
    return of_rows, of_columns


def _why_not(case: Case) -> str:
    if refused := why_not_portable(case):
        return refused
    formats = [Format.parse(form) for form in case.scheme.split("@")]
    for fmt in formats:
        if refused := why_not_form(fmt):
            return refused
        if "stochastic" in case.extras and fmt.element.kind != "int":
            return f"wants integers where it rounds at random, got {fmt}"
        if "act_scale" in case.extras and (fmt.block != "tensor" or fmt.scale != "fp32"):
            return f"wants one fp32 scale for the tensor where it is given, got {fmt}"
    blocks = {fmt.block for fmt in formats}
    squares = {block for block in blocks if "x" in block and not block.startswith("1x")}
    if len(squares) > 1 or (squares and "tensor" in blocks):
        return f"wants squares of one size, and no scale for the tensor beside them, got {case.scheme}"
    sides = [int(block.partition("x")[2]) for block in blocks if "x" in block]
    if squares and int(min(squares).partition("x")[0]) < max(sides):
        return f"wants squares that hold the blocks beside them, got {case.scheme}"
    return "" if case.shape[-1] % 16 == 0 else f"wants K in multiples of 16, got {case.shape[-1]}"


KERNELS = (
    Kernel(
        op="cast_both", name="cast_both", rank=50, layout="", why_not=_why_not, run=_run,
        how=lambda case: "amax, scales and codes of the matrix and of its transpose, in registers",
        cases=(
            "e4m3/tensor@e4m3/tensor", "e5m2/tensor@e5m2/tensor", "e4m3/row@e4m3/row", "e4m3/row*e8m0@e4m3/row*e8m0",
            "e4m3/row@e4m3/tensor", "e4m3/1x128@e4m3/1x128", "e4m3/128x128@e4m3/128x128", "e4m3/1x32*e8m0@e4m3/1x32*e8m0",
            "e2m1/1x32*e8m0@e4m3/1x32*e8m0", "int8/row@int8/row",
        ),
        about="a matrix and its transpose cast together, in Triton",
    ),
)  # fmt: skip
