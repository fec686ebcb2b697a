"""The scale of each block, chosen inside a Triton kernel from the block's own numbers: the bytes of `numerics.quantize`.

A tile x holds a block a row, float32, what is masked zero. The rules are those of `numerics/math.py`: absmax and symmetric
(LARGEST says by how much), the powers of two of MX, and asymmetric with its zero point.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import MAGIC, at_least, bits_of, e8m0_code, e8m0_value, float_of, rounded, stored_scale

KERNELS = ()


@triton.jit
def largest_of(part_ptr, parts, PARTS: tl.constexpr):
    """The largest magnitude of a tensor, from what an amax kernel left: bits, one number a program."""
    lane = tl.arange(0, PARTS)
    return float_of(tl.max(tl.load(part_ptr + lane, mask=lane < parts, other=0), axis=0))


@triton.jit
def outer_scale(largest, OUTER: tl.constexpr):
    """The scale of e4m3 scales; OUTER: 448 times the element's largest value."""
    outer = tl.div_rn(largest, OUTER)
    return tl.where(outer == 0.0, 1.0, at_least(outer, 2.0**-120))  # TINY / 2**-6


@triton.jit
def amax_of(x):
    """The largest magnitude of each block; a maximum of bits, in which NaN is larger than infinity."""
    return float_of(tl.max(bits_of(x) & 0x7FFFFFFF, axis=1))


@triton.jit
def power_scale(amax, RULE: tl.constexpr, EMAX: tl.constexpr, ABOVE: tl.constexpr, INTEGER: tl.constexpr):
    """A power of two as it is stored, its value, and its inverse."""
    stored = e8m0_code(amax, RULE, EMAX, ABOVE, INTEGER)
    inverse = tl.where(
        stored == 0xFF, float("nan"), float_of(tl.where(stored == 0xFE, 0x00400000, (254 - stored) << 23))
    )
    return stored, e8m0_value(stored), inverse


@triton.jit
def range_scale(x, outer, SCALE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO: tl.constexpr):
    """Scale as stored, its value and inverse, and the zero point. ZERO: 1 an integer, 2 a float32, 3 bf16, 4 fp16."""
    low, high = tl.min(tl.minimum(x, 0.0), axis=1), tl.max(tl.maximum(x, 0.0), axis=1)
    lost = tl.max(bits_of(x) & 0x7FFFFFFF, axis=1) > 0x7F800000  # NaN, which a minimum forgets
    low, high = tl.where(lost, float("nan"), low), tl.where(lost, float("nan"), high)
    whole = high - low
    steps: tl.constexpr = QMAX - QMIN
    scale = tl.where(whole == float("inf"), tl.div_rn(high, steps) - tl.div_rn(low, steps), tl.div_rn(whole, steps))
    stored, value, inverse = stored_scale(scale, outer, SCALE)
    below = tl.div_rn(low, value)
    if ZERO == 1:
        below = below + MAGIC - MAGIC
    zero = QMIN - below
    if ZERO == 1:
        zero = tl.where(zero == zero, tl.minimum(tl.maximum(zero, QMIN), QMAX), 0.0)
    else:
        zero = tl.where(zero == zero, tl.minimum(tl.maximum(zero, QMIN), QMAX), zero)
        zero = rounded(zero, ZERO - 2)
    return stored, value, inverse, zero


@triton.jit
def block_scale(
    x, part_ptr, parts, PARTS: tl.constexpr, TENSOR: tl.constexpr, ZERO: tl.constexpr, QMIN: tl.constexpr,
    QMAX: tl.constexpr, LARGEST: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, EMAX: tl.constexpr,
    ABOVE: tl.constexpr, OUTER: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """Scale as stored, its value and inverse, the zero point, and the scale of the scales, by the format's own rule.

    PARTS: of the tensor's largest magnitude, 0 where nobody asks. TENSOR: one scale for all. The rest: `cast.constants_of`."""
    outer = 1.0
    largest = 0.0
    if PARTS:
        largest = largest_of(part_ptr, parts, PARTS)
    if SCALE == 5:
        outer = outer_scale(largest, OUTER)
    if ZERO:
        stored, value, inverse, zero = range_scale(x, outer, SCALE, QMIN, QMAX, ZERO)
    else:
        zero = 0.0
        if TENSOR:
            amax = tl.full((x.shape[0],), 0.0, tl.float32) + largest
        else:
            amax = amax_of(x)
        if SCALE == 4:
            stored, value, inverse = power_scale(amax, RULE, EMAX, ABOVE, INTEGER)
        else:
            stored, value, inverse = stored_scale(tl.div_rn(amax, LARGEST), outer, SCALE)
    return stored, value, inverse, zero, outer
