"""Activation casts in one pass over memory: amax, scale and codes in one launch, x read once.

    codes, scales   the bytes of `numerics.quantize`, exactly
    values          codes and scales at once, back in x's dtype: (code - zero_point) * scale
    codes as bf16   (code - zero_point) in a float that a tensor core multiplies, the token's scale apart
    interleaved     codes, column 8 h + i of each 16 at 2 i + h, as the float8 product of `cuda_/multiply8.cu` reads them

A program holds a tile of whole blocks in registers: one token or several where the scale belongs to the row, many blocks of 16,
32 or 128 columns otherwise. One scale for the tensor (int8/tensor, and the outer scale of NVFP4) needs the largest magnitude of
all first: a launch that answers one maximum a program, which the second launch reads.

amax is a maximum of bits, not of floats: NaN is larger than infinity there, so neither is lost. How numbers are rounded, to the
very bytes of `numerics`, stands in `rounding.py`.

Legend: M tokens, K columns; a tile is RB blocks of G columns, GP = G rounded up to a power of two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import ELEMENTS, Element, Format, Parts
from ...numerics.math import RULES, ZERO_POINT_DTYPES
from ...ops.cast import (
    codes_reference,
    empty_parts,
    fake_reference,
    interleaved_reference,
    part_names,
    reference,
    why_not_interleaved,
)
from ...ops.registry import Case, Kernel, device_capability
from . import interpreted, why_not_portable
from .launch import aligned, begin, define, launch, plain
from .rounding import (
    MAGIC,
    TINY,
    at_least,
    bits_of,
    encode,
    quotient,
    rounded,
    stored_scale,
    to_bf16,
    widen,
)
from .scales import amax_of, block_scale

_WIDEST = 65536  # columns that a program holds: 64 for each of 1024 threads
_TILE = 2048  # numbers of a tile of small blocks
_PROGRAMS = 512  # at most, that look for the largest magnitude of a tensor

CODES, VALUES, AS_FLOAT, INTERLEAVED = 0, 1, 2, 3

# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["units"], do_not_specialize_on_alignment=["pre_ptr"])
def _amax_kernel(
    x_ptr, pre_ptr, part_ptr, units, K, TILE: tl.constexpr, PRE: tl.constexpr, XROUND: tl.constexpr, UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of every so many tiles, as bits: one number a program. UNIT: numbers read as one."""
    begin(EARLY)
    total = units.to(tl.int64) * UNIT
    lane = tl.arange(0, TILE)
    largest = tl.zeros((TILE,), dtype=tl.int32)
    start = tl.program_id(0).to(tl.int64) * TILE
    while start < total:
        at = start + lane
        x = widen(tl.load(x_ptr + at, mask=at < total, other=0.0))
        if PRE:
            x = rounded(x * rounded(widen(tl.load(pre_ptr + at % K)), XROUND), XROUND)
        largest = tl.maximum(largest, bits_of(x) & 0x7FFFFFFF)
        start += tl.num_programs(0) * TILE
    tl.store(part_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit(
    do_not_specialize=["blocks", "rows", "parts"],
    do_not_specialize_on_alignment=[
        "pre_ptr",
        "act_ptr",
        "out_ptr",
        "scale_ptr",
        "zero_ptr",
        "outer_ptr",
        "part_ptr",
        "fill_ptr",
    ],
)
def _cast_kernel(
    x_ptr, pre_ptr, act_ptr, out_ptr, scale_ptr, zero_ptr, outer_ptr, part_ptr, fill_ptr, x_stride, blocks, rows, parts,
    G: tl.constexpr, GP: tl.constexpr, RB: tl.constexpr, BPR: tl.constexpr, MODE: tl.constexpr, PRE: tl.constexpr,
    XROUND: tl.constexpr, STATIC: tl.constexpr, TENSOR: tl.constexpr, ACROSS: tl.constexpr, PARTS: tl.constexpr,
    FILL: tl.constexpr, KIND: tl.constexpr, MBITS: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr,
    BITS: tl.constexpr, NAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, LARGEST: tl.constexpr,
    RECIPROCAL: tl.constexpr, ZERO: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, EMAX: tl.constexpr,
    ABOVE: tl.constexpr, OUTER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile. ACROSS: scales stand (K/G, rows). TENSOR: blocks only cut the work, one scale serves all.

    MODE: 0 codes, 1 values, 2 codes as floats, 3 interleaved. FILL: so many numbers become zero. The rest is `constants_of`."""
    begin(EARLY)
    block = tl.program_id(0) * RB + tl.arange(0, RB)
    lane = tl.arange(0, GP)
    row, column = block // BPR, block % BPR
    from_lane = lane
    if MODE == 3:
        from_lane = lane // 16 * 16 + lane % 2 * 8 + lane % 16 // 2
    at = column[:, None] * G + from_lane[None, :]
    mask = (block[:, None] < blocks) & (lane[None, :] < G)
    x = widen(tl.load(x_ptr + row[:, None].to(tl.int64) * x_stride + at, mask=mask, other=0.0))
    if PRE:
        x = rounded(x * rounded(widen(tl.load(pre_ptr + at, mask=mask, other=0.0)), XROUND), XROUND)
    if FILL:  # noqa: SIM102 -- decided when it is compiled
        if tl.program_id(0) == 0:
            tl.store(fill_ptr + tl.arange(0, FILL), tl.zeros((FILL,), dtype=tl.int32))

    if STATIC:
        scale = tl.full((RB,), 0.0, tl.float32) + widen(tl.load(act_ptr))
        if KIND == 0:  # what integers cannot hold, a NaN, shows in the scale
            amax = amax_of(x)
            scale = tl.where(amax == amax, scale, float("nan"))
        stored, value, inverse = stored_scale(scale, 1.0, SCALE)
    else:
        stored, value, inverse, zero, outer = block_scale(
            x, part_ptr, parts, PARTS, TENSOR, ZERO, QMIN, QMAX, LARGEST, SCALE, RULE, EMAX, ABOVE, OUTER, KIND == 0
        )

    if RECIPROCAL:
        q = x * inverse[:, None]
    else:
        narrow: tl.constexpr = not PRE and KIND != 0 and x_ptr.dtype.element_ty != tl.float32
        q = quotient(x, value[:, None], STATIC, narrow)
    if ZERO:
        q = (q + MAGIC - MAGIC) + zero[:, None]
    code, number = encode(q, KIND, MBITS, LOWEST, TOP, BITS, NAN, QMIN, QMAX)

    to = block[:, None].to(tl.int64) * G + lane[None, :]
    if MODE == 0 or MODE == 3:
        tl.store(out_ptr + to, code, mask=mask)
    else:
        if ZERO:
            number = number - zero[:, None]
        if MODE == 1:
            if SCALE == 5:
                value = at_least(value, TINY)
            number = number * value[:, None]
        if out_ptr.dtype.element_ty == tl.bfloat16:
            tl.store(out_ptr + to, to_bf16(number), mask=mask)
        else:
            tl.store(out_ptr + to, number.to(out_ptr.dtype.element_ty), mask=mask)
    if MODE != 1:
        if TENSOR:
            tl.store(scale_ptr + block, stored, mask=block == 0)
        elif ACROSS:
            tl.store(scale_ptr + column.to(tl.int64) * rows + row, stored, mask=block < blocks)
        else:
            tl.store(scale_ptr + block, stored, mask=block < blocks)
        if SCALE == 5:
            tl.store(outer_ptr + block, tl.full((RB,), 0.0, tl.float32) + outer, mask=block == 0)
    if MODE == 0 and ZERO:
        tl.store(zero_ptr + block, zero.to(tl.int32), mask=block < blocks)


# -- what is fixed for a format and a width ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """How activations of one format and width are cast.

    Args:
        fmt: the format. constants: those of `_cast_kernel` that the format decides, in order.
        group, padded: columns of a block (K for rows, a slice for a tensor), and that rounded up to a power of two.
        blocks: of a tile. per_row: blocks of a token. warps: of a program. tensor: one scale for all.
        needs_amax: of the whole tensor, in a launch before. code_dtype, scale_dtype: that codes and
        scales are written in; code_view, scale_view: that they are shown in, where it is another. zero_dtype: of the zero point.
        nested: the scale has a scale.
    """

    fmt: Format
    constants: tuple[Any, ...]
    group: int
    padded: int
    blocks: int
    per_row: int
    warps: int
    tensor: bool
    needs_amax: bool
    code_dtype: torch.dtype
    code_view: torch.dtype | None
    scale_dtype: torch.dtype
    scale_view: torch.dtype | None
    zero_dtype: torch.dtype | None
    nested: bool


_ZEROS = {None: 0, "int8": 1, "uint8": 1, "int32": 1, "fp32": 2, "bf16": 3, "fp16": 4}
_SCALES = {"fp32": 0, "bf16": 1, "fp16": 2, "e4m3": 3, "e8m0": 4}
_RULES = {"floor": 0, "ceil": 1, "rceil": 2, "even": 3}
_POWERS = ("floor", "ceil", "rceil", "even")


def why_not_format(fmt: Format, columns: int, extras: tuple[str, ...] = ()) -> str:
    """ "" or why a format is not one that these kernels cast to."""
    element = fmt.element
    if element.kind not in ("int", "float") or element.bits < 4 or element.specials in ("fnuz", "nan"):
        return f"wants integers of 4 to 8 bits, e4m3, e5m2 or MX's small floats, got {element.name}"
    if element.limits is not None or fmt.rule not in ("absmax", "symmetric", "asymmetric", *_POWERS):
        return f"wants a scale by absmax, symmetric, asymmetric or a power of two, got {fmt}"
    if fmt.zero_point not in (None, "int8", "uint8", "int32") or (fmt.zero_point and fmt.block == "tensor"):
        return f"wants no zero point, or an integer for each token or block, got {fmt}"
    if fmt.nested is not None and str(fmt.nested) != "e4m3/tensor":
        return f"wants a scale that is a number, or quantized as e4m3/tensor, got {fmt}"
    if fmt.block not in ("row", "tensor") and not fmt.block.startswith("1x"):
        return f"wants a scale for the tensor, a token or a part of a token, got {fmt}"
    group = columns if fmt.block in ("row", "tensor") else int(fmt.block.removeprefix("1x"))
    if columns % 16 or columns % group or group > _WIDEST:
        return (
            f"wants K in multiples of 16 and of the block, and blocks of at most {_WIDEST}, got K={columns} and {fmt}"
        )
    if "act_scale" in extras and (fmt.nested is not None or fmt.zero_point or fmt.scale == "e8m0"):
        return f"wants a static scale to be a number of its own, got {fmt}"
    return ""


@functools.cache
def _plan(spelling: str, columns: int, sm: int) -> Plan:
    fmt = Format.parse(spelling)
    element = fmt.element
    tensor = fmt.block == "tensor"
    group = columns if fmt.block == "row" else 1024 if tensor else int(fmt.block.removeprefix("1x"))
    if tensor:
        group = next(size for size in (1024, 512, 256, 128, 64, 32, 16) if columns % size == 0)
    padded = triton.next_power_of_2(group)
    blocks = max(1, min(_TILE if fmt.block != "row" else 1024, _TILE) // padded)
    code_dtype = torch.int8 if element.kind == "int" and element.qmin < 0 else torch.uint8
    nested, scale = fmt.nested, "e4m3" if fmt.nested else str(fmt.scale)
    scale_dtype = ELEMENTS[scale].dtype
    return Plan(
        fmt=fmt,
        constants=constants_of(fmt, sm),
        group=group,
        padded=padded,
        blocks=blocks,
        per_row=columns // group,
        warps=max(1, min(32 if padded > 32768 else 16, blocks * padded // 1024)) if fmt.block == "row" else 4,
        tensor=tensor,
        needs_amax=tensor or nested is not None,
        code_dtype=code_dtype,
        code_view=None if element.dtype == code_dtype else element.dtype,
        scale_dtype=torch.uint8 if scale in ("e4m3", "e8m0") else scale_dtype,
        scale_view=scale_dtype if scale in ("e4m3", "e8m0") else None,
        zero_dtype=ZERO_POINT_DTYPES[fmt.zero_point] if fmt.zero_point else None,
        nested=nested is not None,
    )


def element_constants(element: Element, sm: int) -> tuple[Any, ...]:
    """What `rounding.encode` is told about an element, in its order."""
    integer = element.kind == "int"
    native = {"e4m3": 1, "e5m2": 2}.get(element.name, 3) if sm >= 89 and not interpreted() else 3
    return (
        0 if integer else native, element.mbits, 128 - element.bias, element.max, element.bits, element.specials != "none",
        float(element.qmin) if integer else 0.0, float(element.qmax) if integer else 0.0,
    )  # fmt: skip


def constants_of(fmt: Format, sm: int) -> tuple[Any, ...]:
    """What a kernel is told about a format, in the order of `_cast_kernel`, from KIND on."""
    element, rule = fmt.element, RULES[fmt.rule]
    largest = (element.max - element.min) / 2 if fmt.rule == "symmetric" else element.largest
    if fmt.rule == "even":
        above = 1 << (23 - (element.bits - 2 if element.kind == "int" else element.mbits) - 1)
    else:
        above = 0 if fmt.rule == "ceil" else int((element.largest / 2.0**element.emax - 1.0) * 2**23)
    return (
        *element_constants(element, sm), float(largest),
        rule.reciprocal or fmt.nested is not None or fmt.scale in ("e4m3", "e8m0"), _ZEROS[fmt.zero_point],
        5 if fmt.nested else _SCALES[str(fmt.scale)], _RULES.get(fmt.rule, 0), element.emax, above, 448.0 * element.largest,
    )  # fmt: skip


_PLANS: dict[tuple[int, int, torch.device], tuple[Plan, Format]] = {}


def plan_of(fmt: Format, columns: int, device: torch.device) -> Plan:
    """The plan of a format and a width on a device."""
    key = (id(fmt), columns, device)
    found = _PLANS.get(key)
    if found is None:
        sm = device_capability(device.type, device.index)
        found = _PLANS[key] = _plan(str(fmt), columns, sm), fmt
    return found[0]


# -- launches ---------------------------------------------------------------------------------------------------------

_XROUND = {torch.bfloat16: 1, torch.float16: 2}


class Cast(NamedTuple):
    """What a launch wrote: `codes` in the element's dtype or a float's, scales as stored, and what else the format has."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    outer: Tensor | None = None


def cast_tensors(
    x_MK: Tensor,
    plan: Plan,
    pre_scale: Tensor | None = None,
    act_scale: Tensor | None = None,
    *,
    mode: int = CODES,
    out_dtype: torch.dtype | None = None,
    rows: int | None = None,
    across: bool = False,
    fill: Tensor | None = None,
) -> Cast:
    """Start the kernels.

    Args:
        x_MK: at least one row. plan: of its format and K. mode: CODES, INTERLEAVED, VALUES, AS_FLOAT; out_dtype: of the last two.
        rows: how many rows the codes and scales are made with, at least M; those beyond M are left as they are.
        across: scales of parts of a token stand (M, K/G) with strides (1, rows), as torch's blockwise product wants them.
        fill: int32, a power of two of numbers, set to zero on the way.
    """
    tokens, columns = x_MK.shape
    device, rows = x_MK.device, rows or tokens
    if x_MK.stride(1) != 1 or (tokens > 1 and x_MK.stride(0) % 16) or (plan.needs_amax and not x_MK.is_contiguous()):
        x_MK = x_MK.contiguous()
    pre_scale = None if pre_scale is None else pre_scale.contiguous()
    parts, count = amax(x_MK, pre_scale, mode) if plan.needs_amax and act_scale is None else (None, 0)
    coded = mode in (CODES, INTERLEAVED)
    codes = torch.empty(rows, columns, dtype=plan.code_dtype if coded else out_dtype, device=device)
    scale = zero = outer = None
    if mode != VALUES:
        scale = _empty_scale(plan, rows, across, device)
        if plan.zero_dtype is not None:
            zero = torch.empty(rows, plan.per_row, dtype=plan.zero_dtype, device=device)
        if plan.nested:
            outer = torch.empty(1, 1, dtype=torch.float32, device=device)
    key = (
        plan, mode, x_MK.dtype, out_dtype, across, aligned(x_MK), None if pre_scale is None else pre_scale.dtype,
        None if act_scale is None else act_scale.dtype, count.bit_length(), None if fill is None else fill.numel(), device.index,
    )  # fmt: skip
    blocks, stride = tokens * plan.per_row, columns if tokens == 1 else x_MK.stride(0)
    args = (x_MK, pre_scale, act_scale, codes, scale, zero, outer, parts, fill, stride, blocks, rows, count)

    def constants() -> tuple[Any, ...]:
        return (
            plan.group, plan.padded, plan.blocks, plan.per_row, mode, pre_scale is not None,
            0 if mode in (VALUES, INTERLEAVED) else _XROUND.get(x_MK.dtype, 0), act_scale is not None, plan.tensor, across,
            1 << count.bit_length() if count else 0, 0 if fill is None else fill.numel(), *plan.constants,
        )  # fmt: skip

    launch(_cast_kernel, key, (-(-blocks // plan.blocks), 1, 1), args, constants, device, plan.warps)
    if coded and plan.code_view is not None:
        codes = codes.view(plan.code_view)
    if scale is not None and plan.scale_view is not None:
        scale = scale.view(plan.scale_view)
    return Cast(codes, codes if scale is None else scale, zero, outer)


def _empty_scale(plan: Plan, rows: int, across: bool, device: torch.device) -> Tensor:
    if plan.tensor:
        return torch.empty(1, 1, dtype=plan.scale_dtype, device=device)
    if across:
        return torch.empty(plan.per_row, rows, dtype=plan.scale_dtype, device=device).t()
    return torch.empty(rows, plan.per_row, dtype=plan.scale_dtype, device=device)


def amax(x_MK: Tensor, pre_scale: Tensor | None, mode: int) -> tuple[Tensor, int]:
    """Start the kernel that looks for a tensor's largest magnitude: its answers as bits, and how many there are."""
    total, device = x_MK.numel(), x_MK.device
    count = min(_PROGRAMS, -(-total // _TILE))
    parts = torch.empty(_PROGRAMS, dtype=torch.int32, device=device)
    xround = 0 if mode == VALUES else _XROUND.get(x_MK.dtype, 0)
    unit = 8 if total % 8 == 0 else 1
    constants = (_TILE, pre_scale is not None, xround, unit)
    key = (
        "amax", constants, x_MK.dtype, aligned(x_MK), None if pre_scale is None else pre_scale.dtype,
        total // unit >> 31, device.index
    )  # fmt: skip
    args = (x_MK, pre_scale, parts, total // unit, x_MK.shape[1])
    launch(_amax_kernel, key, (count, 1, 1), args, lambda: constants, device, 4)
    return parts, count


# -- the op's four forms ----------------------------------------------------------------------------------------------


def _cast_run(x: Tensor, fmt: str, act_scale: Tensor | None, pre_scale: Tensor | None) -> list[Tensor]:
    parts = _cast(x, Format.parse(fmt), act_scale, pre_scale)
    return list(parts.tensors().values())


def _cast_fake(x: Tensor, fmt: str, act_scale: Tensor | None, pre_scale: Tensor | None) -> list[Tensor]:
    return empty_parts(x, Format.parse(fmt), tuple(x.shape))


def _cast(x: Tensor, fmt: Format, act_scale: Tensor | None, pre_scale: Tensor | None) -> Parts:
    if x.dim() != 2 or x.numel() == 0 or (act_scale is not None and act_scale.numel() != 1):
        return reference(x, fmt, act_scale, pre_scale)
    made = cast_tensors(x, plan_of(fmt, x.shape[1], x.device), pre_scale, act_scale)
    return Parts(qdata=made.codes, scale=made.scale, zero_point=made.zero_point, scale_scale=made.outer)


def _run_cast(x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None) -> Parts:
    if plain(x_MK):
        return _cast(x_MK, fmt, act_scale, pre_scale)
    made = torch.ops.lowp.cast(x_MK, str(fmt), act_scale, pre_scale)
    return Parts(**dict(zip(part_names(fmt), made, strict=True)))


def _fake_cast_run(x: Tensor, fmt: str, act_scale: Tensor | None, pre_scale: Tensor | None) -> Tensor:
    return _fake_cast(x, Format.parse(fmt), act_scale, pre_scale)


def _fake_cast(x: Tensor, fmt: Format, act_scale: Tensor | None, pre_scale: Tensor | None) -> Tensor:
    if x.dim() != 2 or x.numel() == 0 or (act_scale is not None and act_scale.numel() != 1):
        return fake_reference(x, fmt, act_scale, pre_scale)
    plan = plan_of(fmt, x.shape[1], x.device)
    return cast_tensors(x, plan, pre_scale, act_scale, mode=VALUES, out_dtype=x.dtype).codes


def _run_fake_cast(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> Tensor:
    if plain(x_MK):
        return _fake_cast(x_MK, fmt, act_scale, pre_scale)
    values: Tensor = torch.ops.lowp.fake_cast(x_MK, str(fmt), act_scale, pre_scale)
    return values


def _codes_run(
    x: Tensor, fmt: str, dtype: torch.dtype, act_scale: Tensor | None, pre_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _codes(x, Format.parse(fmt), dtype, act_scale, pre_scale)


def _codes_fake(
    x: Tensor, fmt: str, dtype: torch.dtype, act_scale: Tensor | None, pre_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0],), dtype=torch.float32)


def _codes(
    x: Tensor, fmt: Format, dtype: torch.dtype, act_scale: Tensor | None, pre_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0 or (act_scale is not None and act_scale.numel() != 1):
        return codes_reference(x, fmt, dtype, act_scale, pre_scale)
    plan = plan_of(fmt, x.shape[1], x.device)
    made = cast_tensors(x, plan, pre_scale, act_scale, mode=AS_FLOAT, out_dtype=dtype)
    scale_M = made.scale.view(-1) if made.scale.dtype == torch.float32 else made.scale.to(torch.float32).view(-1)
    return made.codes, scale_M.expand(x.shape[0]).contiguous() if plan.tensor else scale_M


def _run_codes(
    x_MK: Tensor, fmt: Format, dtype: torch.dtype, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if plain(x_MK):
        return _codes(x_MK, fmt, dtype, act_scale, pre_scale)
    codes, scale_M = torch.ops.lowp.cast_codes_as(x_MK, str(fmt), dtype, act_scale, pre_scale)
    return codes, scale_M


def _interleaved_run(x: Tensor, fmt: str, act_scale: Tensor | None, pre_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _interleaved(x, Format.parse(fmt), act_scale, pre_scale)


def _interleaved_fake(x: Tensor, fmt: str, act_scale: Tensor | None, pre_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=Format.parse(fmt).element.dtype), x.new_empty((x.shape[0],), dtype=torch.float32)


def _interleaved(x: Tensor, fmt: Format, act_scale: Tensor | None, pre_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if x.numel() == 0 or (act_scale is not None and act_scale.numel() != 1):
        return interleaved_reference(x, fmt, act_scale, pre_scale)
    made = cast_tensors(x, plan_of(fmt, x.shape[1], x.device), pre_scale, act_scale, mode=INTERLEAVED)
    return made.codes, made.scale.view(-1)


def _run_interleaved(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if plain(x_MK):
        return _interleaved(x_MK, fmt, act_scale, pre_scale)
    codes, scale_M = torch.ops.lowp.cast_interleaved(x_MK, str(fmt), act_scale, pre_scale)
    return codes, scale_M


define("cast", "(Tensor x, str fmt, Tensor? act_scale, Tensor? pre_scale) -> Tensor[]", _cast_run, _cast_fake)
define(
    "fake_cast",
    "(Tensor x, str fmt, Tensor? act_scale, Tensor? pre_scale) -> Tensor",
    _fake_cast_run,
    lambda x, fmt, act_scale, pre_scale: x.new_empty(x.shape),
)
define(
    "cast_codes_as",
    "(Tensor x, str fmt, ScalarType dtype, Tensor? act_scale, Tensor? pre_scale) -> (Tensor, Tensor)",
    _codes_run,
    _codes_fake,
)
define(
    "cast_interleaved",
    "(Tensor x, str fmt, Tensor? act_scale, Tensor? pre_scale) -> (Tensor, Tensor)",
    _interleaved_run,
    _interleaved_fake,
)


def _why_not(case: Case, by_token: bool = False) -> str:
    if refused := why_not_portable(case):
        return refused
    fmt = case.weight
    if by_token and (fmt.block not in ("row", "tensor") or fmt.nested is not None or fmt.scale == "e8m0"):
        return f"wants a scale for each token or the tensor, got {fmt}"
    return (
        "wants a format that is coded, got " + str(fmt)
        if fmt.is_identity
        else why_not_format(fmt, case.shape[-1], case.extras)
    )


_CASES = (
    "int8/row", "int8/row+int8", "int8/tensor", "e4m3/row", "e4m3/tensor", "e5m2/row", "e4m3/1x128", "e4m3/1x32*e8m0",
    "e2m1/1x32*e8m0", "e2m1/1x16*e4m3/tensor",
)  # fmt: skip


def _how(case: Case) -> str:
    element = case.weight.element
    if element.kind == "int":
        return f"amax, scale and {element.name} codes in registers"
    if element.name in ("e4m3", "e5m2") and case.sm >= 89:
        return f"native: amax and scale in registers, {element.name} by the hardware's conversion"
    return f"emulated: amax, scale and {element.name} codes by arithmetic in registers"


KERNELS = (
    Kernel(
        op="cast", name="cast", rank=50, layout="", why_not=_why_not, run=_run_cast, how=_how, cases=_CASES,
        about="amax, scale and codes in one pass, in Triton",
    ),
    Kernel(
        op="fake_cast", name="fake_cast", rank=50, layout="", why_not=_why_not, run=_run_fake_cast, how=_how, cases=_CASES,
        about="quantized and dequantized in one pass, in Triton",
    ),
    Kernel(
        op="cast_codes_as", name="cast_codes_as", rank=50, layout="", why_not=functools.partial(_why_not, by_token=True),
        run=_run_codes, how=_how, cases=_CASES[:6], about="codes in bf16 or fp16, the token's scale apart, in Triton",
    ),
    Kernel(
        op="cast_interleaved", name="cast_interleaved", rank=50, layout="",
        why_not=lambda case: why_not_interleaved(case) or _why_not(case),
        run=_run_interleaved, how=_how, cases=("e4m3/row",),
        about="codes with the halves of each 16 columns interleaved, the token's scale apart, in Triton",
    ),
)  # fmt: skip
