"""A matrix and its transpose into low precision, together: what a linear layer's training asks of each of its tensors.

    rows      codes (M, K), scales along K: for the product over K        columns     codes (K, M), scales along M: over M

A program holds a square of the matrix. Scales of blocks (1x32, 1x128, 128x128) are found inside of it, so x is read once and
both forms are written: 2 bytes in and 2 out for float8. One scale for a row, a column or the matrix needs magnitudes from other
squares: a launch before this one finds all three at once, as maxima of bits (NaN is the largest of them), and x is read twice.

The bytes are those of `numerics.quantize`, exactly; rounded at random (integers alone) they are not compared but unbiased:
floor(q), or one more where Philox's number for this place is below q - floor(q).

Legend: M rows, K columns, S the side of the square, G numbers along the summed axis that share a scale.
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
from .launch import aligned, begin, launch
from .rounding import bits_of, encode, float_of, quotient, stored_scale, widen
from .scales import power_scale

_BLOCKS, _ROW, _TENSOR, _SQUARE = 0, 1, 2, 3  # who shares a scale: G numbers, a row, all, or a square
_LONGEST = 128  # numbers along an axis that share a scale inside a square


@triton.jit
def _square(x_ptr, M, K, x_stride, S: tl.constexpr):
    m = tl.program_id(1) * S + tl.arange(0, S)
    k = tl.program_id(0) * S + tl.arange(0, S)
    inside = (m[:, None] < M) & (k[None, :] < K)
    x = widen(tl.load(x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :], mask=inside, other=0.0))
    return x, m, k


@triton.jit(do_not_specialize=["M"])
def _amaxes_kernel(
    x_ptr, row_ptr, column_ptr, M, K, x_stride, S: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """The largest magnitudes, as bits: of rows and columns (1), or of all (2), where they are asked for."""
    begin(EARLY)
    x, m, k = _square(x_ptr, M, K, x_stride, S)
    bits = bits_of(x) & 0x7FFFFFFF
    if ROW == 1:
        tl.atomic_max(row_ptr + m, tl.max(bits, axis=1), mask=m < M)
    if COLUMN == 1:
        tl.atomic_max(column_ptr + k, tl.max(bits, axis=0), mask=k < K)
    if ROW == 2:
        tl.atomic_max(row_ptr, tl.max(bits))
    if ROW != 2 and COLUMN == 2:
        tl.atomic_max(column_ptr, tl.max(bits))


@triton.jit
def _coded(
    x, amax, given, noise, STATIC: tl.constexpr, RANDOM: tl.constexpr, KIND: tl.constexpr, MBITS: tl.constexpr,
    LOWEST: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    LARGEST: tl.constexpr, RECIPROCAL: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr,
    EMAX: tl.constexpr, ABOVE: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """Codes of x and the scale as it is stored; amax: magnitudes by scale, in a shape that spreads over x."""
    if SCALE == 4:
        stored, value, inverse = power_scale(amax, RULE, EMAX, ABOVE, KIND == 0)
    else:
        scale = tl.div_rn(amax, LARGEST)
        if STATIC:
            scale = amax * 0.0 + given
        stored, value, inverse = stored_scale(scale, 1.0, SCALE)
    if RECIPROCAL:
        q = x * inverse
    else:
        q = quotient(x, value, STATIC)
    if RANDOM:
        low = tl.floor(q)
        q = tl.where(noise < q - low, low + 1.0, low)
    code, _number = encode(q, KIND, MBITS, LOWEST, TOP, BITS, NAN, QMIN, QMAX)
    return code, stored


@triton.jit(do_not_specialize=["M", "seed"])
def _both_kernel(
    x_ptr, given_ptr, row_ptr, column_ptr, r_ptr, rs_ptr, c_ptr, cs_ptr, M, K, MP, x_stride, seed, S: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RWHO: tl.constexpr, RG: tl.constexpr, CWHO: tl.constexpr, CG: tl.constexpr,
    STATIC: tl.constexpr, RANDOM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One square of both forms. R and C are `constants_of` their formats; MP: M with the rows of zeros below."""
    begin(EARLY)
    x, m, k = _square(x_ptr, M, K, x_stride, S)
    bits = bits_of(x) & 0x7FFFFFFF
    given = 1.0
    if STATIC:
        given = widen(tl.load(given_ptr))
    noise = 0.0
    first_k = (m * 0 + tl.program_id(0)) == 0  # as vectors, which masks want
    first_m = (k * 0 + tl.program_id(1)) == 0
    one = tl.zeros((1, 1), tl.int32)
    first = (one + tl.program_id(0) + tl.program_id(1)) == 0
    if RWHO == 3 or CWHO == 3:
        whole = float_of(one + tl.max(bits))
    elif STATIC:
        whole = float_of(one)
    elif RWHO == 2:
        whole = float_of(tl.load(row_ptr + one))
    elif CWHO == 2:
        whole = float_of(tl.load(column_ptr + one))
    else:
        whole = float_of(one)
    at = m[:, None].to(tl.int64) * K + k[None, :]

    if ROWS:
        if RANDOM:
            noise = tl.rand(seed, at)
        if RWHO == 0:
            GROUPS: tl.constexpr = S // RG
            group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
            amax = float_of(tl.max(tl.reshape(bits, (S, GROUPS, RG)), axis=2, keep_dims=True))
            spread = tl.reshape(noise, (S, GROUPS, RG)) if RANDOM else noise
            code, stored = _coded(tl.reshape(x, (S, GROUPS, RG)), amax, given, spread, STATIC, RANDOM, *R)
            code = tl.reshape(code, (S, S))
            here = (m[:, None] < M) & (group[None, :] * RG < K)
            tl.store(
                rs_ptr + m[:, None].to(tl.int64) * (K // RG) + group[None, :],
                tl.reshape(stored, (S, GROUPS)),
                mask=here,
            )
        else:
            amax = whole
            if RWHO == 1:
                amax = float_of(tl.load(row_ptr + m, mask=m < M, other=0))[:, None]
            code, stored = _coded(x, amax, given, noise, STATIC, RANDOM, *R)
            if RWHO == 1:
                tl.store(rs_ptr + m, tl.reshape(stored, (S,)), mask=(m < M) & first_k)
            elif RWHO == 2:
                tl.store(rs_ptr + one, stored, mask=first)
            else:
                tl.store(rs_ptr + one + tl.program_id(1) * tl.cdiv(K, S) + tl.program_id(0), stored)
        tl.store(r_ptr + at, code, mask=(m[:, None] < M) & (k[None, :] < K))

    if COLUMNS:
        if RANDOM:
            noise = tl.rand(seed + 1, at)
        if CWHO == 0:
            DOWN: tl.constexpr = S // CG
            below = tl.program_id(1) * DOWN + tl.arange(0, DOWN)
            amax = float_of(tl.max(tl.reshape(bits, (DOWN, CG, S)), axis=1, keep_dims=True))
            spread = tl.reshape(noise, (DOWN, CG, S)) if RANDOM else noise
            code, stored = _coded(tl.reshape(x, (DOWN, CG, S)), amax, given, spread, STATIC, RANDOM, *C)
            code = tl.reshape(code, (S, S))
            here = (k[:, None] < K) & (below[None, :] * CG < MP)
            to = cs_ptr + k[:, None].to(tl.int64) * (MP // CG) + below[None, :]
            tl.store(to, tl.trans(tl.reshape(stored, (DOWN, S))), mask=here)
        else:
            amax = whole
            if CWHO == 1:
                amax = float_of(tl.load(column_ptr + k, mask=k < K, other=0))[None, :]
            code, stored = _coded(x, amax, given, noise, STATIC, RANDOM, *C)
            if CWHO == 1:
                tl.store(cs_ptr + k, tl.reshape(stored, (S,)), mask=(k < K) & first_m)
            elif CWHO == 2:
                tl.store(cs_ptr + one, stored, mask=first)
            else:
                tl.store(cs_ptr + one + tl.program_id(0) * tl.cdiv(MP, S) + tl.program_id(1), stored)
        to = c_ptr + k[:, None].to(tl.int64) * MP + m[None, :]
        tl.store(to, tl.trans(code), mask=(k[:, None] < K) & (m[None, :] < MP))


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
    if rows and not columns and not stochastic and not why_not_format(Format.parse(rows), width):
        made_rows = cast_tensors(x_MK, plan_of(Format.parse(rows), width, x_MK.device), None, act_scale)
        return [made_rows.codes, made_rows.scale]  # a row in registers: x is read once
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    device, height = x_MK.device, -(-tokens // multiple) * multiple
    sm = device_capability(device.type, device.index)
    forms = [_form(rows, sm) if rows else None, _form(columns, sm) if columns else None]
    made = [
        None if form is None else _empty(form, shape, device)
        for form, shape in zip(forms, ((tokens, width), (width, height)), strict=True)
    ]
    squares = [form.group for form in forms if form is not None and form.who == _SQUARE]
    side = squares[0] if squares else _LONGEST if any(form and form.group > 64 for form in forms) else 64
    grid = (-(-width // side), -(-height // side), 1)
    amaxes = _amaxes(x_MK, forms, side, grid) if act_scale is None else (x_MK, x_MK)
    seed = int(torch.randint(0, 2**31 - 1, ())) if stochastic else 0
    row_form, column_form = (form or next(other for other in forms if other) for form in forms)
    pointers = [tensor for pair in made for tensor in (pair or (x_MK, x_MK))]
    args = (x_MK, act_scale, *amaxes, *pointers, tokens, width, height, x_MK.stride(0), seed)
    static, random = act_scale is not None, stochastic
    key = (
        "both", rows, columns, side, static, random, x_MK.dtype, aligned(x_MK), _seen(x_MK.stride(0)), _seen(height),
        None if act_scale is None else act_scale.dtype, device.index,
    )  # fmt: skip

    def constants() -> tuple[Any, ...]:
        return (
            side, bool(rows), bool(columns), row_form.who if rows else -1, row_form.group,
            column_form.who if columns else -1, column_form.group, static, random,
            row_form.constants, column_form.constants,
        )  # fmt: skip

    launch(_both_kernel, key, grid, args, constants, device, 8 if side > 64 else 4)
    return [
        tensor.view(dtype)
        for form, pair in zip(forms, made, strict=True)
        if form is not None and pair is not None
        for tensor, dtype in zip(pair, (form.fmt.element.dtype, form.scale), strict=True)
    ]


def _seen(size: int) -> int:
    """What Triton specializes an integer for: 1, a multiple of 16 (of rows: words of 16 bytes are moved), or neither."""
    return 1 if size == 1 else 16 if size % 16 == 0 else 0


def _empty(form: _Form, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes and scales in dtypes that Triton's interpreter knows."""
    scales = (1, 1) if form.who == _TENSOR else form.fmt.scale_shape(shape)
    kept = torch.float32 if form.scale == torch.float32 else torch.uint8
    return torch.empty(shape, dtype=form.kept, device=device), torch.empty(scales, dtype=kept, device=device)


def _amaxes(x_MK: Tensor, forms: list[_Form | None], side: int, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Magnitudes of rows and columns, or of all, where a scale is shared by more than a square."""
    who = [form.who if form is not None and form.who in (_ROW, _TENSOR) else 0 for form in forms]
    if not any(who):
        return x_MK, x_MK
    sizes = [{_ROW: length, _TENSOR: 1}.get(one, 0) for one, length in zip(who, x_MK.shape, strict=True)]
    start = -(-sizes[0] // 4) * 4  # at a multiple of 16 bytes, as a compiled kernel was told that pointers are
    both = torch.zeros(start + sizes[1], dtype=torch.int32, device=x_MK.device)
    of_rows, of_columns = both[: sizes[0]], both[start:]
    if who == [_TENSOR, _TENSOR]:
        of_columns = of_rows
    key = ("amaxes", tuple(who), side, x_MK.dtype, aligned(x_MK), _seen(x_MK.stride(0)), x_MK.device.index)
    args = (x_MK, of_rows, of_columns, *x_MK.shape, x_MK.stride(0))
    launch(_amaxes_kernel, key, grid, args, lambda: (side, *who), x_MK.device, 8 if side > 64 else 4)
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
