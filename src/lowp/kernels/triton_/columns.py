"""GPTQ's inner loop in one launch: a program takes a few rows of the weight and goes through all columns of a step.

    left_BR    B columns of R rows, in registers: what is left to be rounded, corrected after each column
    per column, in order: pick it out, encode and decode it, error, subtract the column of the factor times the error

In torch the same takes a dozen launches a column, and 38912 columns a block of Llama-3-8B: seconds of host time. The errors of a
step go to memory, for the product that corrects the columns behind it. Codes and errors are the reference's, bit for bit:
rounding is that of `rounding.py`, and the difference of the correction is not fused with its product.

A column is picked out of the tile as a sum of bits in which all others are zero, so that it is exact. A codebook is encoded by
counting the boundaries below a number.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import Format
from ...ops.columns import Columns
from ...ops.registry import Case, Kernel, device_capability
from . import why_not_portable
from .cast import element_constants
from .launch import aligned, begin, launch
from .rounding import MAGIC, bits_of, encode, float_of, quotient

_ROWS = 16  # of the weight in a program: 128 columns of them are 64 registers for each of its threads


@triton.jit
def _from_codebook(x, bounds_ptr, values_ptr, SIZE: tl.constexpr):
    """Code and value of the nearest of SIZE values in rising order; bounds: the SIZE - 1 between them, and NaN."""
    bound = tl.load(bounds_ptr + tl.arange(0, SIZE))
    code = tl.sum((x[:, None] >= bound[None, :]).to(tl.int32), axis=1)
    return code.to(tl.uint8), tl.load(values_ptr + code)


@triton.jit(do_not_specialize=["rows", "columns", "factor_stride"])
def _columns_kernel(
    left_ptr, factor_ptr, steps_ptr, places_ptr, by_ptr, inverse_ptr, offset_ptr, bounds_ptr, values_ptr, codes_ptr, errors_ptr,
    rows, columns, factor_stride,
    B: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INVERSE: tl.constexpr, ZERO: tl.constexpr,
    SIZE: tl.constexpr, KIND: tl.constexpr, MBITS: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr,
    BITS: tl.constexpr, NAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """R rows of the weight. ZERO: 1 whole zero points, 2 others. SIZE: of a codebook. The rest is `element_constants`."""
    begin(EARLY)
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, B)
    inside = row < rows
    wide = rows.to(tl.int64)
    at = column[:, None] * wide + row[None, :]
    left = tl.load(left_ptr + at, mask=(column[:, None] < columns) & inside[None, :], other=0.0)
    row_blocks = rows // BN
    for j in range(columns):
        x = float_of(tl.sum(tl.where(column[:, None] == j, bits_of(left), 0), axis=0))
        place = tl.load(places_ptr + j)
        block = (place // BK) * row_blocks + row // BN
        by = tl.load(by_ptr + block, mask=inside, other=1.0)
        if INVERSE:
            q = x * tl.load(inverse_ptr + block, mask=inside, other=1.0)
        else:
            q = quotient(x, by, True)
        if ZERO:
            offset = tl.load(offset_ptr + block, mask=inside, other=0.0)
            if ZERO == 1:
                q = q + MAGIC - MAGIC
            q = q + offset
        if SIZE:
            code, number = _from_codebook(q, bounds_ptr, values_ptr, SIZE)
        else:
            code, number = encode(q, KIND, MBITS, LOWEST, TOP, BITS, NAN, QMIN, QMAX)
        if ZERO:
            number = number - offset
        error = (x - number * by) * tl.load(steps_ptr + j)
        tl.store(codes_ptr + place * wide + row, code, mask=inside)
        tl.store(errors_ptr + j * wide + row, error, mask=inside)
        behind = (column > j) & (column < columns)
        factor = tl.load(factor_ptr + j * factor_stride.to(tl.int64) + column, mask=behind, other=0.0)
        left = left - factor[:, None] * error[None, :]


@functools.cache
def _codebook(spelling: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boundaries, padded to as many as there are values, and values by code; empty for other elements."""
    element = Format.parse(spelling).element
    if element.kind != "codebook":
        return torch.empty(0, device=device), torch.empty(0, device=device)
    bounds = [*element._lists[1][:-1], float("nan")]  # the last of the list is overflow; NaN is never reached
    return torch.tensor(bounds, device=device), element.table(device)


def _run(left_BN: Tensor, factor_BB: Tensor, places_B: Tensor, columns: Columns, codes_KN: Tensor) -> Tensor:
    """Start the kernel."""
    fmt, grid, device = columns.fmt, columns.grid, left_BN.device
    count, rows = left_BN.shape
    errors_BN = torch.empty_like(left_BN)
    steps_B = factor_BB.diagonal().reciprocal()
    bounds, values = _codebook(str(fmt), device)
    zero = 0 if grid.offset is None else 1 if grid.integer_offset else 2
    size = triton.next_power_of_2(count)
    codes = codes_KN.view(torch.int8 if fmt.element.dtype == torch.int8 else torch.uint8)
    args = (
        left_BN, factor_BB, steps_B, places_B, grid.by, grid.inverse, grid.offset, bounds, values, codes, errors_BN, rows, count,
        factor_BB.stride(0),
    )  # fmt: skip
    key = ("columns", str(fmt), columns.block, size, grid.inverse is None, zero, device.index)
    key = (*key, *(t is None or aligned(t) for t in args[:11]))

    def constants() -> tuple[Any, ...]:
        sm = device_capability(device.type, device.index)
        return (
            size,
            _ROWS,
            *columns.block,
            grid.inverse is not None,
            zero,
            len(bounds),
            *element_constants(fmt.element, sm),
        )

    launch(_columns_kernel, key, (-(-rows // _ROWS), 1, 1), args, constants, device, warps=1)
    return errors_BN


def _why_not(case: Case) -> str:
    if refused := why_not_portable(case):
        return refused
    element = case.weight.element
    if element.kind == "codebook":
        codes = element._lists[0][:-1]
        return "" if codes == tuple(range(len(codes))) else f"wants a codebook in rising order, got {element.name}"
    if element.kind not in ("int", "float") or element.specials in ("fnuz", "nan"):
        return f"wants integers, e4m3, e5m2, MX's small floats or a codebook, got {element.name}"
    return ""


def _how(case: Case) -> str:
    return f"{case.weight.element.name} codes of all columns of a step, column after column in registers"


KERNELS = (
    Kernel(
        op="round_columns", name="columns", rank=50, layout="", why_not=_why_not, run=_run, how=_how,
        cases=("int4/1x128*bf16", "int3/1x128*bf16", "e2m1/1x32*e8m0", "nf4/1x64"),
        about="all columns of a step in one launch, in Triton",
    ),
)  # fmt: skip
