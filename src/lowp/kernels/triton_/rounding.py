"""Rounding inside a Triton kernel, to the bytes of `numerics`: quotients, elements, scales.

What exactness asks for:
  - Triton's `/` is approximate on a GPU. A quotient is x * (1 / s), corrected by the remainder with fused multiply-adds, both
    operands first moved by the power of two that brings s to [1, 2): as IEEE's division, bit for bit (Markstein, "IA-64 and
    elementary functions", section 8). The interpreter does not fuse, there it is numpy's division. Numbers that were bf16 or
    fp16 need one correction (see `quotient`).
  - Integers are rounded by adding 1.5 * 2**23, which leaves them in the low bits: nearest, ties to even.
  - float8 is the hardware's own conversion from sm89 on (saturating, NaN kept), elsewhere arithmetic as in `Element.encode`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import interpreted

KERNELS = ()

_NO_FMA = tl.constexpr(interpreted())
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: the step between floats of this size is 1
TINY = tl.constexpr(2.0**-126)
_HUGE = tl.constexpr(2.0**60)  # a quotient that large saturates in every element

# -- numbers ----------------------------------------------------------------------------------------------------------


@triton.jit
def bits_of(x):
    """The bits of a float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 of some bits."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """To float32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_bf16(x):
    """The nearest bf16, ties to even; NaN stays."""
    if _NO_FMA:  # the interpreter does not round to nearest even
        bits = bits_of(x)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in float32, after a visit to bf16 (1) or fp16 (2)."""
    if DTYPE == 1:
        return widen(to_bf16(x))
    elif DTYPE == 2:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def quotient(x, s, STATIC: tl.constexpr, NARROW: tl.constexpr = False):
    """x / s, rounded as IEEE rounds; s is positive, infinite or NaN, one for each row of the tile.

    NARROW: one correction is enough where x has at most 11 significant bits (bf16, fp16), whatever s: all 2**10 x 2**23 pairs
    of mantissas were tried, none differs. A quotient beyond 2**59 may come out smaller, one that is subnormal is rounded twice.
    """
    if _NO_FMA:
        return tl.div_rn(x, s)
    else:
        a, d, r = _moved(x, s, STATIC)
        q = a * r
        q = tl.fma(tl.fma(q, d, a), r, q)
        if not NARROW:
            q = tl.fma(tl.fma(q, d, a), r, q)
        return q


@triton.jit
def _moved(x, s, STATIC: tl.constexpr):
    """-x and s, moved by the power of two that brings s to [1, 2), and -1 / s.

    With these signs no instruction only negates, and -0.0 stays: q = 0.0 r = -0.0, q d + a = 0.0, and 0.0 r + q = -0.0."""
    exponent = tl.minimum(bits_of(s) & 0x7F800000, 0x7E800000)
    shift = float_of(0x7F000000 - exponent)
    shift = tl.where(s == float("inf"), 0.0, shift)
    d = tl.where(s == float("inf"), 1.0, s * shift)
    a = x * float_of(bits_of(shift) | -2147483648)
    if STATIC:  # elsewhere x / s is at most the element's largest value
        a = tl.where(a > _HUGE, _HUGE, tl.where(a < -_HUGE, -_HUGE, a))
    return a, d, tl.div_rn(-1.0, d)


@triton.jit
def encode_float(
    q, MBITS: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr
):
    """Code and value of the nearest small float; LOWEST: float32's exponent field of its smallest normal value."""
    magnitude = tl.abs(q)
    magnitude = tl.where(magnitude < TOP, magnitude, TOP)
    exponent = tl.maximum(bits_of(magnitude) >> 23, LOWEST)
    steps = magnitude * float_of((254 + MBITS - exponent) << 23) + MAGIC
    sign = bits_of(q) & -2147483648
    if not NAN and not _NO_FMA:  # a GPU's division answers NaN without a sign, `quotient` gives it that of x
        sign = tl.where(q == q, sign, 0)
    code = (bits_of(steps) & 0x3FFFFF) + ((exponent - LOWEST) << MBITS)
    code = code | ((sign >> (32 - BITS)) & (1 << (BITS - 1)))
    value = float_of(bits_of((steps - MAGIC) * float_of((exponent - MBITS) << 23)) | sign)
    if NAN:
        code = tl.where(q == q, code, 0x7F)
        value = tl.where(q == q, value, q)
    return code.to(tl.uint8), value


@triton.jit
def encode(
    q, KIND: tl.constexpr, MBITS: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    """Code and value of the nearest element. KIND: 0 integer, 1 e4m3 and 2 e5m2 by the hardware, 3 float by arithmetic."""
    if KIND == 0:
        q = tl.where(q == q, q, 0.0)
        steps = tl.minimum(tl.maximum(q, QMIN), QMAX) + MAGIC
        code = bits_of(steps)
        return code.to(tl.int8 if QMIN < 0 else tl.uint8), steps - MAGIC
    elif KIND == 1:
        code = q.to(tl.float8e4nv)
        return code.to(tl.uint8, bitcast=True), code.to(tl.float32)
    elif KIND == 2:
        code = q.to(tl.float8e5)
        return code.to(tl.uint8, bitcast=True), code.to(tl.float32)
    else:
        return encode_float(q, MBITS, LOWEST, TOP, BITS, NAN)


# -- scales -----------------------------------------------------------------------------------------------------------


@triton.jit
def e8m0_code(amax, RULE: tl.constexpr, EMAX: tl.constexpr, ABOVE: tl.constexpr, INTEGER: tl.constexpr):
    """The code of a power of two, as `numerics.math.e8m0_scale`. RULE: 0 floor, 1 ceil, 2 rceil, 3 even (ABOVE is added)."""
    bits = bits_of(amax)
    exponent = (bits >> 23) & 0xFF
    if RULE == 3:
        exponent = ((bits + ABOVE) >> 23) & 0xFF
    elif RULE != 0:
        exponent += ((bits & 0x7FFFFF) > ABOVE).to(tl.int32)
    code = tl.minimum(tl.maximum(exponent - EMAX, 0), 0xFE)
    if RULE == 2:
        code = tl.where(bits == 0x7F800000, 0xFE, code)
    lost = (bits >= 0x7F800000) if INTEGER else (bits > 0x7F800000)
    return tl.where(lost, 0xFF, code)


@triton.jit
def e8m0_value(code):
    """The power of two of a code; 0xFF is NaN."""
    value = float_of(tl.where(code == 0, 0x00400000, code << 23))  # 2**-127 is subnormal
    return tl.where(code == 0xFF, float("nan"), value)


@triton.jit
def at_least(x, low: tl.constexpr):
    """x, or `low` where it is smaller; NaN stays."""
    return tl.where(x < low, low, x)


@triton.jit
def stored_scale(scale, outer, SCALE: tl.constexpr):
    """A scale as it is stored, its value, and its inverse. SCALE: 0 fp32, 1 bf16, 2 fp16, 3 e4m3, 5 e4m3 under `outer`."""
    if SCALE == 0:
        value = at_least(scale, TINY)
        return value, value, tl.div_rn(1.0, value)
    elif SCALE == 1:
        top: tl.constexpr = 3.3895313892515355e38  # bf16's largest, (2 - 2**-7) * 2**127
        held = at_least(scale, TINY)
        held = tl.where((held > top) & (held != float("inf")), top, held)
        stored = to_bf16(held)
        value = widen(stored)
        return stored, value, tl.div_rn(1.0, value)
    elif SCALE == 2:
        held = at_least(scale, 2.0**-24)
        held = tl.where((held > 65504.0) & (held != float("inf")), 65504.0, held)
        stored = held.to(tl.float16)
        value = stored.to(tl.float32)
        return stored, value, tl.div_rn(1.0, value)
    elif SCALE == 3:
        held = tl.where(scale == float("inf"), float("nan"), at_least(scale, 2.0**-6))
        stored, value = encode_float(held, 3, 121, 448.0, 8, True)
        return stored, value, tl.div_rn(1.0, value)
    else:
        held = at_least(tl.div_rn(at_least(scale, TINY), outer), 2.0**-6)
        stored, by = encode_float(held, 3, 121, 448.0, 8, True)
        value = by * outer
        return stored, value, tl.div_rn(tl.div_rn(1.0, outer), by)
