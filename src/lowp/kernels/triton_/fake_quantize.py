"""Fake quantization of weights in one pass: a tile is read, its scales are chosen, and its values or its gradient are written.

    fake_quantize        x -> (q - zero_point) * scale, in x's dtype                 one read, one write
    fake_quantize_grad   gradient, x -> gradient where x was not clamped, else 0     scales chosen again, nothing kept between

A program holds whole blocks in registers, of one row or several (128x128); scales are never written. The bytes are those of
`numerics` (`rounding.py`, `scales.py`), the rule of the gradient that of `numerics/reach.py`.

Legend: a tile is RB blocks of SIZE = GR x G numbers, GP = SIZE rounded up to a power of two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import Format
from ...ops.fake_quantize import grad_reference, reference
from ...ops.registry import Case, Kernel, device_capability
from . import why_not_portable
from .cast import VALUES, amax, constants_of
from .launch import aligned, begin, launch
from .rounding import MAGIC, TINY, at_least, encode, quotient, to_bf16, widen
from .scales import block_scale

_WIDEST = 65536  # numbers of a block that a program holds: 64 for each of 1024 threads
_TILE = 2048  # numbers of a tile of small blocks


@triton.jit
def tile_of(
    blocks, K, G: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, RB: tl.constexpr, BPR: tl.constexpr
):  # fmt: skip
    """The blocks of this program (RB,), where their numbers lie (RB, GP), and which of them there are."""
    block = tl.program_id(0) * RB + tl.arange(0, RB)
    lane = tl.arange(0, GP)
    row = (block // BPR)[:, None] * (SIZE // G) + (lane // G)[None, :]
    at = row.to(tl.int64) * K + (block % BPR)[:, None] * G + (lane % G)[None, :]
    return block, at, (block[:, None] < blocks) & (lane[None, :] < SIZE)


@triton.jit
def store_floats(at, number, mask):
    """Write float32 numbers in the dtype of where they go: fp16 saturates, infinity and NaN stay."""
    if at.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bf16(number), mask=mask)
    elif at.dtype.element_ty == tl.float16:
        held = tl.where(number > 65504.0, 65504.0, tl.where(number < -65504.0, -65504.0, number))
        number = tl.where(tl.abs(number) == float("inf"), number, held)
        tl.store(at, number.to(tl.float16), mask=mask)
    else:
        tl.store(at, number, mask=mask)


@triton.jit(do_not_specialize=["blocks", "parts"], do_not_specialize_on_alignment=["part_ptr"])
def _fake_kernel(
    x_ptr, grad_ptr, out_ptr, part_ptr, blocks, K, parts,
    G: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, RB: tl.constexpr, BPR: tl.constexpr, GRAD: tl.constexpr,
    TENSOR: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, MBITS: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr,
    NAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, LARGEST: tl.constexpr, RECIPROCAL: tl.constexpr,
    ZERO: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, EMAX: tl.constexpr, ABOVE: tl.constexpr, OUTER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One tile. TENSOR: blocks only cut the work, one scale serves all. GRAD: write the gradient. The rest is `constants_of`."""
    begin(EARLY)
    _, at, mask = tile_of(blocks, K, G, SIZE, GP, RB, BPR)
    x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))

    _, value, inverse, zero, _ = block_scale(
        x, part_ptr, parts, PARTS, TENSOR, ZERO, QMIN, QMAX, LARGEST, SCALE, RULE, EMAX, ABOVE, OUTER, KIND == 0
    )
    if GRAD:
        v = x * inverse[:, None]
        if ZERO:
            v += zero[:, None]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
        tl.store(out_ptr + at, tl.where((v < LOW) | (v > HIGH), 0.0, grad), mask=mask)
    else:
        if RECIPROCAL:
            q = x * inverse[:, None]
        else:
            q = quotient(x, value[:, None], False, x_ptr.dtype.element_ty == tl.bfloat16 and SCALE == 1)
        if ZERO == 1:
            q = (q + MAGIC - MAGIC) + zero[:, None]
        elif ZERO:
            q += zero[:, None]
        _, number = encode(q, KIND, MBITS, LOWEST, TOP, BITS, NAN, QMIN, QMAX)
        if ZERO:
            number -= zero[:, None]
        if SCALE == 5:
            value = at_least(value, TINY)
        number *= value[:, None]
        store_floats(out_ptr + at, number, mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """How weights of one format and width are fake-quantized.

    Args:
        rows, columns: of a block. tile: blocks of a program. warps: of a program. tensor: one scale for all; blocks cut the work.
        constants: of `_fake_kernel`, those that the format decides, from LOW on.
    """

    rows: int
    columns: int
    tile: int
    warps: int
    tensor: bool
    needs_amax: bool
    constants: tuple[Any, ...]


@functools.cache
def plan_of(spelling: str, columns: int, sm: int) -> Plan:
    fmt = Format.parse(spelling)
    tensor = fmt.block == "tensor"
    rows, wide = _block(fmt, columns)
    padded = triton.next_power_of_2(rows * wide)
    tile = max(1, _TILE // padded)
    return Plan(
        rows=rows,
        columns=wide,
        tile=tile,
        warps=max(4, min(32 if padded > 32768 else 16, tile * padded // 1024)),
        tensor=tensor,
        needs_amax=tensor or fmt.nested is not None,
        constants=(*fmt.element.reach, *constants_of(fmt, sm)),
    )


def _block(fmt: Format, columns: int) -> tuple[int, int]:
    """Rows and columns of what a program takes as one block."""
    if fmt.block == "tensor":
        return 1, next(size for size in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if columns % size == 0)
    if fmt.block == "row":
        return 1, columns
    rows, wide = (int(size) for size in fmt.block.split("x"))
    return rows, wide


def launched(grad: Tensor | None, x: Tensor, fmt: Format) -> Tensor:
    """Start the kernel on a matrix, or a stack of them whose blocks know nothing of one another."""
    fmt.block_dims(tuple(x.shape))  # a misfit is an error
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    plan = plan_of(str(fmt), x_MK.shape[1], device_capability(x.device.type, x.device.index))
    out = torch.empty_like(x_MK)
    grad = None if grad is None else grad.reshape(x_MK.shape).contiguous()
    parts, count = amax(x_MK, None, VALUES) if plan.needs_amax else (None, 0)
    per_row = x_MK.shape[1] // plan.columns
    blocks = x_MK.shape[0] // plan.rows * per_row
    size = plan.rows * plan.columns
    same = None if grad is None else grad.dtype, grad is None or aligned(grad)
    key = ("fake", plan, x.dtype, *same, aligned(x_MK), count.bit_length(), x_MK.shape[1] % 16 == 0, x.device.index)

    def constants() -> tuple[Any, ...]:
        return (
            plan.columns, size, triton.next_power_of_2(size), plan.tile, per_row, grad is not None, plan.tensor,
            1 << count.bit_length() if count else 0, *plan.constants,
        )  # fmt: skip

    args = (x_MK, grad, out, parts, blocks, x_MK.shape[1], count)
    launch(_fake_kernel, key, (-(-blocks // plan.tile), 1, 1), args, constants, x.device, plan.warps)
    return out.reshape(x.shape)


def _run(x: Tensor, fmt: Format) -> Tensor:
    return launched(None, x, fmt) if _serves(x, fmt) else reference(x, fmt)


def _run_grad(grad: Tensor, x: Tensor, fmt: Format) -> Tensor:
    return launched(grad, x, fmt) if _serves(x, fmt) else grad_reference(grad, x, fmt)


def _serves(x: Tensor, fmt: Format) -> bool:
    """Whether one launch has one scale of scales, and any number at all."""
    return x.numel() > 0 and x.dim() >= 2 and (x.dim() == 2 or not (fmt.block == "tensor" or fmt.nested))


def why_not(case: Case) -> str:
    if refused := why_not_portable(case):
        return refused
    fmt = case.weight
    element = fmt.element
    if element.kind not in ("int", "float") or element.specials in ("fnuz", "nan"):
        return f"wants integers, e4m3, e5m2 or MX's small floats, got {fmt}"
    if element.limits is not None or fmt.rule not in (
        "absmax",
        "symmetric",
        "asymmetric",
        "floor",
        "ceil",
        "rceil",
        "even",
    ):
        return f"wants a scale by absmax, symmetric, asymmetric or a power of two, got {fmt}"
    if fmt.nested is not None and str(fmt.nested) != "e4m3/tensor":
        return f"wants a scale that is a number, or quantized as e4m3/tensor, got {fmt}"
    if fmt.zero_point and (fmt.block == "tensor" or fmt.nested is not None):
        return f"wants a zero point for each row or block and a plain scale, got {fmt}"
    rows, columns = _block(fmt, case.shape[-1])
    if rows * columns > _WIDEST or case.shape[-1] % columns:
        return f"wants blocks of at most {_WIDEST} numbers that divide K, got K={case.shape[-1]} and {fmt}"
    return ""


_CASES = (
    "int4/1x128*bf16", "int4/1x32*bf16", "int8/row", "int3/1x32*bf16+bf16", "int2/1x32*bf16+bf16", "e4m3/row", "e4m3/128x128",
    "e4m3/1x32*e8m0", "e2m1/1x32*e8m0", "e2m1/1x16*e4m3/tensor",
)  # fmt: skip


def _how(case: Case) -> str:
    return f"scale and {case.weight.element.name} values in registers, by the arithmetic of cast"


KERNELS = (
    Kernel(
        op="fake_quantize", name="fake_quantize", rank=50, layout="", why_not=why_not, run=_run, how=_how, cases=_CASES,
        about="one read, one write, in Triton",
    ),
    Kernel(
        op="fake_quantize_grad", name="fake_quantize_grad", rank=50, layout="", why_not=why_not, run=_run_grad, how=_how,
        cases=_CASES, about="the gradient where nothing was clamped, scales chosen again, in Triton",
    ),
)  # fmt: skip
