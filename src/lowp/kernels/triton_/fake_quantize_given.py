"""Fake quantization with learned scales in one pass, and its whole gradient in another: one read of x and, backward, of dy.

    fake_quantize_given        x, scale (, zero_point) -> (q - zero_point) * scale                 one read, one write
    fake_quantize_given_grad   dy, x, scale (, zero_point) -> dx, and of each block dscale (, dzero_point)

    dscale       = sum dy * (q - z - v' where x was rounded, q - z where it was clamped),  v' = x / scale
    dzero_point  = sum dy * (0 where it was rounded, -scale where it was clamped)

Scales are a parameter, float32: they are rounded to what is stored, straight through, in registers. The bytes are those of
`numerics` (`rounding.py`); sums are in float32, in another order than the reference's.

Source: Esser et al., LSQ, arXiv 1902.08153, equations 3 to 5; Bhalgat et al., LSQ+, arXiv 2004.09576.
Legend: a tile is RB blocks of SIZE = GR x G numbers, GP = SIZE rounded up to a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import Format
from ...numerics.math import ZERO_POINT_DTYPES
from ...ops.fake_quantize import given_grad_reference, given_reference
from ...ops.registry import Case, Kernel, device_capability
from .fake_quantize import plan_of, store_floats, tile_of
from .fake_quantize import why_not as why_not_scaled
from .launch import aligned, begin, launch
from .rounding import MAGIC, encode, quotient, rounded, stored_scale, widen


@triton.jit(do_not_specialize=["blocks"])
def _given_kernel(
    x_ptr, grad_ptr, scale_ptr, zero_ptr, out_ptr, dscale_ptr, dzero_ptr, blocks, K,
    G: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, RB: tl.constexpr, BPR: tl.constexpr, GRAD: tl.constexpr,
    PASS: tl.constexpr, ZLOW: tl.constexpr, ZHIGH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KIND: tl.constexpr, MBITS: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr,
    NAN: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, LARGEST: tl.constexpr, RECIPROCAL: tl.constexpr,
    ZERO: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, EMAX: tl.constexpr, ABOVE: tl.constexpr, OUTER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One tile. GRAD: write the gradients. PASS: dx is dy. ZLOW, ZHIGH: of an integer zero point. The rest: `_fake_kernel`."""
    begin(EARLY)
    block, at, mask = tile_of(blocks, K, G, SIZE, GP, RB, BPR)
    x = widen(tl.load(x_ptr + at, mask=mask, other=0.0))
    _, value, inverse = stored_scale(tl.load(scale_ptr + block, mask=block < blocks, other=1.0), 1.0, SCALE)
    if RECIPROCAL:
        steps = x * inverse[:, None]
    else:
        steps = quotient(x, value[:, None], True, x_ptr.dtype.element_ty == tl.bfloat16 and SCALE == 1)
    q = steps
    if ZERO:
        zero = tl.load(zero_ptr + block, mask=block < blocks, other=0.0)
        if ZERO == 1:
            zero = tl.minimum(tl.maximum(zero + MAGIC - MAGIC, ZLOW), ZHIGH)
            q = (q + MAGIC - MAGIC) + zero[:, None]
        else:
            zero = rounded(zero, ZERO - 2)
            q += zero[:, None]
    _, number = encode(q, KIND, MBITS, LOWEST, TOP, BITS, NAN, QMIN, QMAX)
    if ZERO:
        number -= zero[:, None]
    if GRAD:
        v = steps
        if ZERO:
            v += zero[:, None]
        clamped = (v < LOW) | (v > HIGH)
        raw = tl.load(grad_ptr + at, mask=mask, other=0.0)
        grad = widen(raw)
        if PASS:
            tl.store(out_ptr + at, raw, mask=mask)
        else:
            tl.store(out_ptr + at, tl.where(clamped, 0.0, raw), mask=mask)
        slope = number - tl.where(clamped, 0.0, steps)
        slope = tl.where(mask, grad * slope, 0.0)
        tl.store(dscale_ptr + block, tl.sum(slope, axis=1), mask=block < blocks)
        if ZERO:
            pushed = tl.where(mask & clamped, -grad * value[:, None], 0.0)
            tl.store(dzero_ptr + block, tl.sum(pushed, axis=1), mask=block < blocks)
    else:
        store_floats(out_ptr + at, number * value[:, None], mask)


def _launched(
    grad: Tensor | None, x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None, clamp: str
) -> list[Tensor]:
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    plan = plan_of(str(fmt), x_MK.shape[1], device_capability(x.device.type, x.device.index))
    given = [None if one is None else one.to(torch.float32).contiguous() for one in (scale, zero_point)]
    grad = None if grad is None else grad.reshape(x_MK.shape).to(x.dtype).contiguous()
    answers = [
        torch.empty_like(x_MK),
        *(None if grad is None or one is None else torch.empty_like(one) for one in given),
    ]
    per_row = x_MK.shape[1] // plan.columns
    blocks, size = x_MK.shape[0] // plan.rows * per_row, plan.rows * plan.columns
    key = (
        "given", plan, x.dtype, clamp, grad is None, *(one is None or aligned(one) for one in (x_MK, grad, *given)),
        x_MK.shape[1] % 16 == 0, x.device.index,
    )  # fmt: skip

    def constants() -> tuple[Any, ...]:
        dtype = ZERO_POINT_DTYPES[str(fmt.zero_point)] if fmt.zero_point else torch.float32
        whole = torch.iinfo(dtype) if not dtype.is_floating_point else None
        ends = (float(whole.min), float(whole.max)) if whole else (0.0, 0.0)
        return (
            plan.columns, size, triton.next_power_of_2(size), plan.tile, per_row, grad is not None, clamp == "pass", *ends,
            *plan.constants,
        )  # fmt: skip

    args = (x_MK, grad, *given, *answers, blocks, x_MK.shape[1])
    launch(_given_kernel, key, (-(-blocks // plan.tile), 1, 1), args, constants, x.device, plan.warps)
    return [
        one.reshape(like.shape).to(like.dtype)
        for one, like in zip(answers, (x, scale, zero_point), strict=True)
        if one is not None and like is not None
    ]


def _run(x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if x.numel() == 0 or x.dim() < 2:
        return given_reference(x, fmt, scale, zero_point)
    fmt.block_dims(tuple(x.shape))  # a misfit is an error
    return _launched(None, x, fmt, scale, zero_point, "zero")[0]


def _run_grad(
    grad: Tensor, x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None, clamp: str
) -> list[Tensor]:
    if x.numel() == 0 or x.dim() < 2:
        return given_grad_reference(grad, x, fmt, scale, zero_point, clamp)
    return _launched(grad, x, fmt, scale, zero_point, clamp)


def _why_not(case: Case) -> str:
    fmt = case.weight
    if refused := why_not_scaled(case):
        return refused
    if fmt.block == "tensor" or fmt.nested is not None or str(fmt.scale) not in ("fp32", "bf16", "fp16"):
        return f"wants a scale for each row or block, in fp32, bf16 or fp16, got {fmt}"
    return ""


_CASES = ("int4/1x32*bf16", "int4/1x128*bf16", "int8/row", "int3/1x32*bf16+bf16", "int2/1x32*bf16+bf16", "e4m3/row")


def _how(case: Case) -> str:
    return f"given scales, {case.weight.element.name} values in registers"


KERNELS = (
    Kernel(
        op="fake_quantize_given", name="fake_quantize_given", rank=50, layout="", why_not=_why_not, run=_run, how=_how,
        cases=_CASES, about="learned scales: one read, one write, in Triton",
    ),
    Kernel(
        op="fake_quantize_given_grad", name="fake_quantize_given_grad", rank=50, layout="", why_not=_why_not, run=_run_grad,
        how=_how, cases=_CASES, about="the gradients of numbers, scales and zero points in one pass, in Triton",
    ),
)  # fmt: skip
