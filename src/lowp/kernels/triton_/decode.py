"""From codes to values, inside a Triton kernel: one decoder for every element, scale and zero point in the plain layout.

    value = (qdata - zero_point) * scale

The codes of a row are a little-endian stream of bits. P codes fill O whole units of 8 or 32 bits (eight codes of 4 bits one
32-bit word, eight of 3 bits three bytes), so a tile of codes is a tile of words, each shifted P times:

    code[n, P g + i] = (word[n, g] >> (bits * i)) & (2**bits - 1)

and the kinds of element differ in the next step alone, with no conversion from integer to float:

    int        put the code, its sign bit flipped, in the mantissa of 2**23; subtract 2**23 + 2**(bits - 1)
    float      put exponent and mantissa where float32 has its own; multiply by 2**(127 - bias), exact for subnormals too
    codebook   look up a table

`Numbers` is what a kernel is told about a format: a constant, so that what a format lacks costs nothing. `decode` is the whole
weight, bit for bit `numerics.dequantize`, or those rows of it that are asked for.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...numerics import ELEMENTS, Format, Scheme
from .launch import begin
from .packed import computed_in, launch_packed, parts_of, register


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a kernel is told about a weight's format.

    Args:
        bits, kind, signed, mbits, bias, specials: as `Element` has them.
        unit: bits of what is loaded, 8 or 32. codes, units: P and O of the page above. levels: log2(P).
        group: columns that share a scale; 0 where all columns do. even: the largest power of two that divides it, so that a tile
            of as many columns lies in one group. scale_rows: rows that share a scale.
        scale_kind: "value" (a float or an integer, loaded), "e8m0", or "float" (codes of a small float).
        scale_bits, scale_mbits, scale_bias, scale_specials: of that small float.
        nested: the scale has a scale of its own, for nest_rows x nest_columns of them; centered: and a zero point.
        zero: there is a zero point.
    """

    bits: int
    kind: str
    signed: bool
    mbits: int
    bias: int
    specials: str
    unit: int
    codes: int
    units: int
    levels: int
    group: int
    even: int
    scale_rows: int
    scale_kind: str
    scale_bits: int
    scale_mbits: int
    scale_bias: int
    scale_specials: str
    nested: bool
    nest_rows: int
    nest_columns: int
    centered: bool
    zero: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A format in a shape: the numbers, and the strides.

    Args:
        rows, columns, stack: N, K and how many such matrices. row_units: units from one row of codes to the next.
        scale_columns: scales from one row of them to the next. nest_columns: likewise of the scales of scales.
        scales, nests: of one matrix.
    """

    numbers: Numbers
    rows: int
    columns: int
    stack: int
    row_units: int
    scale_columns: int
    nest_columns: int
    scales: int
    nests: int


def why_not(fmt: Format, shape: tuple[int, ...]) -> str:
    """ "" or one sentence why no kernel here reads this format in this shape."""
    if fmt.is_identity:
        return f"wants a quantized weight, got {fmt}"
    if len(shape) < 2:
        return f"wants matrices (..., N, K), got shape {shape}"
    if fmt.nested is not None and fmt.nested.element.kind == "codebook":
        return f"wants scales in integers or floats, got {fmt}"
    return ""


def _group(fmt: Format, shape: tuple[int, ...]) -> int:
    columns = fmt.block_dims(shape)[1]
    return 0 if columns == shape[-1] else columns


@functools.cache
def plan(scheme: str, shape: tuple[int, ...]) -> Plan:
    """What the kernels are told about a weight of this scheme and shape."""
    fmt = Scheme.parse(scheme).weight
    element, nested, (rows, columns) = fmt.element, fmt.nested, shape[-2:]
    scale_shape, group = fmt.scale_shape(shape), _group(fmt, shape)
    words = columns * element.bits % 32 == 0 and 32 % element.bits == 0
    unit, codes = (32, 32 // element.bits) if words else (8, 8 // math.gcd(8, element.bits))
    nest_block = nested.block_dims(scale_shape) if nested else (1, 1)
    nest_shape = nested.scale_shape(scale_shape) if nested else (1, 1)
    small = nested.element if nested else ELEMENTS[str(fmt.scale)]
    is_float = small.kind == "float" and small.name != "e8m0"
    numbers = Numbers(
        bits=element.bits, kind=element.kind, signed=element.signed, mbits=element.mbits, bias=element.bias,
        specials=element.specials, unit=unit, codes=codes, units=codes * element.bits // unit, levels=codes.bit_length() - 1,
        group=group, even=group & -group, scale_rows=fmt.block_dims(shape)[0],
        scale_kind="float" if is_float else "e8m0" if small.name == "e8m0" else "value",
        scale_bits=small.bits, scale_mbits=small.mbits, scale_bias=small.bias, scale_specials=small.specials,
        nested=nested is not None, nest_rows=nest_block[0], nest_columns=nest_block[1],
        centered=bool(nested and nested.zero_point), zero=bool(fmt.zero_point),
    )  # fmt: skip
    return Plan(
        numbers=numbers, rows=rows, columns=columns, stack=math.prod(shape[:-2]),
        row_units=-(-columns * element.bits // unit), scale_columns=scale_shape[-1], nest_columns=nest_shape[-1],
        scales=math.prod(scale_shape[-2:]), nests=math.prod(nest_shape[-2:]),
    )  # fmt: skip


@functools.cache
def exact_in(scheme: str, dtype: torch.dtype) -> bool:
    """Whether elements, scales and zero points are numbers of this 16-bit dtype, and `values_in` can put the elements together:
    then (value - zero_point) * scale may be worked out in it, two at a time; the product is rounded once, as from float32."""
    fmt = Scheme.parse(scheme).weight
    element, bf16 = fmt.element, dtype is torch.bfloat16
    if dtype not in (torch.bfloat16, torch.float16) or element.kind not in ("int", "float") or fmt.zero_point == "fp32":
        return False
    if element.kind == "int" and element.bits > (7 if bf16 else 10):  # bits of the mantissa
        return False
    if element.kind == "float" and not (bf16 or element.ebits < 5 or element.bias == 15):
        return False
    scales = ("bf16", "e8m0", "e4m3") if bf16 else ("fp16", "e4m3")
    return fmt.block in ("row", "tensor") or fmt.scale in scales


# -- inside a kernel: N rows, columns [k, k + K) of a tile ------------------------------------------------------------


@triton.jit
def _small_float(code: tl.tensor, F: tl.constexpr, OF_SCALE: tl.constexpr) -> tl.tensor:
    BITS: tl.constexpr = F.scale_bits if OF_SCALE else F.bits
    MBITS: tl.constexpr = F.scale_mbits if OF_SCALE else F.mbits
    BIAS: tl.constexpr = F.scale_bias if OF_SCALE else F.bias
    SPECIALS: tl.constexpr = F.scale_specials if OF_SCALE else F.specials
    magnitude = code & ((1 << (BITS - 1)) - 1)
    # To the top, and down again to where float32 has its mantissa: the copies of the sign on the way are masked off.
    field = ((code << (32 - BITS)) >> (9 - BITS + MBITS)) & (-(1 << 31) | (((1 << (BITS - 1)) - 1) << (23 - MBITS)))
    value = field.to(tl.float32, bitcast=True) * (2.0 ** (127 - BIAS))
    if SPECIALS == "fnuz":
        value = tl.where(code == (1 << (BITS - 1)), float("nan"), value)
    if SPECIALS == "ieee":  # infinity and NaN keep their mantissa
        special = (field | 0x7F800000).to(tl.float32, bitcast=True)
        value = tl.where(magnitude >= (1 << (BITS - 1)) - (1 << MBITS), special, value)
    if SPECIALS == "fn":
        value = tl.where(magnitude == (1 << (BITS - 1)) - 1, float("nan"), value)
    return value


@triton.jit
def codes_tile(
    q_ptr: tl.tensor, row_N: tl.tensor, k: tl.tensor, R: tl.tensor, F: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr
) -> tl.tensor:
    """Codes (N, K), int32. row_N: where each row begins, in units. k: the first column. R: units of a row."""
    groups: tl.constexpr = K // F.codes
    units: tl.constexpr = F.units
    levels: tl.constexpr = F.levels
    at = (k // F.codes + tl.arange(0, groups)) * F.units
    if F.units == 1:
        if EVEN:
            word = tl.load(q_ptr + (row_N[:, None] + at[None, :])).to(tl.int32)
        else:
            word = tl.load(q_ptr + (row_N[:, None] + at[None, :]), mask=(at < R)[None, :], other=0).to(tl.int32)
    else:
        wide: tl.constexpr = tl.int32 if F.units <= 4 else tl.int64
        word = tl.zeros((row_N.shape[0], groups), wide)
        for i in tl.static_range(units):
            octet = tl.load(q_ptr + (row_N[:, None] + (at + i)[None, :]), mask=(at + i < R)[None, :], other=0)
            word = word | (octet.to(wide) << (8 * i))
    for level in tl.static_range(
        levels
    ):  # each step makes two of each word, the second shifted by half of what is left
        half = word >> ((F.codes >> (level + 1)) * F.bits)
        word = tl.reshape(tl.join(word, half), (word.shape[0], word.shape[1] * 2))
    return (word & ((1 << F.bits) - 1)).to(tl.int32)


@triton.jit
def values(codes: tl.tensor, table_ptr: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """The element's values, float32, of any shape."""
    if F.kind == "int":
        half: tl.constexpr = (1 << (F.bits - 1)) if F.signed else 0
        value = ((codes ^ half) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + half)  # 0x4B000000: 2**23
    elif F.kind == "float":
        value = _small_float(codes, F, False)
    else:
        value = tl.load(table_ptr + codes).to(tl.float32)
    return value


@triton.jit
def values_in(codes: tl.tensor, dtype: tl.constexpr, F: tl.constexpr) -> tl.tensor:
    """As `values`, for integers and floats, in the 16 bits of `dtype`: two numbers an instruction."""
    mantissa: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    one: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
    if F.kind == "int":
        half: tl.constexpr = (1 << (F.bits - 1)) if F.signed else 0
        magic: tl.constexpr = one + (mantissa << mantissa)  # 2**mantissa: there a step of the last bit is 1
        bits = (codes ^ half) | magic
        value = bits.to(tl.int16).to(dtype, bitcast=True) - (2.0**mantissa + half)
    else:
        magnitude = codes & ((1 << (F.bits - 1)) - 1)
        mask: tl.constexpr = -(1 << 31) | (((1 << (F.bits - 1)) - 1) << (16 + mantissa - F.mbits))
        bits = (((codes << (32 - F.bits)) >> (16 - F.bits + F.mbits - mantissa)) & mask) >> 16
        value = bits.to(tl.int16).to(dtype, bitcast=True) * (2.0 ** ((one >> mantissa) - F.bias))
        if F.specials == "fnuz":
            value = tl.where(codes == (1 << (F.bits - 1)), float("nan"), value)
        if F.specials == "ieee":
            special = (bits | (((1 << (15 - mantissa)) - 1) << mantissa)).to(tl.int16).to(dtype, bitcast=True)
            value = tl.where(magnitude >= (1 << (F.bits - 1)) - (1 << F.mbits), special, value)
        if F.specials == "fn":
            value = tl.where(magnitude == (1 << (F.bits - 1)) - 1, float("nan"), value)
    return value


@triton.jit
def groups_at(k: tl.tensor, SC: tl.tensor, F: tl.constexpr, BK: tl.constexpr) -> tl.tensor:
    """The group that the columns [k, k + BK) lie in, a number; or the groups (G,) of each F.even of them. k: a multiple of BK.
    Columns past the end have the last."""
    if F.group == 0:
        return k * 0
    elif F.even >= BK:
        return tl.minimum(k // F.group, SC - 1)
    elif F.even == F.group:  # consecutive, which the compiler sees
        return tl.minimum(k // F.group + tl.arange(0, BK // F.group), SC - 1)
    else:
        return tl.minimum((k + F.even * tl.arange(0, BK // F.even)) // F.group, SC - 1)


@triton.jit
def place(row_N: tl.tensor, g: tl.tensor, F: tl.constexpr, BK: tl.constexpr) -> tl.tensor:
    """Where the scales lie: (N,) for one group, (N, G) for more."""
    if F.group == 0 or F.even >= BK:
        return row_N + g
    else:
        return row_N[:, None] + g[None, :]


@triton.jit
def read_scale(raw: tl.tensor, ss_ptr: tl.tensor, sz_ptr: tl.tensor, nest_at: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """Stored scales to float32, of any shape. nest_at: where their own scales lie."""
    if F.scale_kind == "float":
        scale = _small_float(raw.to(tl.int32), F, True)
    elif F.scale_kind == "e8m0":
        code = raw.to(tl.int32)
        bits = tl.where(code == 0, 0x00400000, code << 23)  # 2**-127 is a subnormal
        scale = tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        scale = raw.to(tl.float32)
    if F.nested:
        if F.centered:
            scale = scale - tl.load(sz_ptr + nest_at)
        scale = scale * tl.load(ss_ptr + nest_at)
        scale = tl.where(
            scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale
        )  # 2**-126, as numerics; NaN stays
    return scale


@triton.jit
def scaled(value: tl.tensor, scale: tl.tensor, zero: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """(value - zero) * scale of a tile (N, K), with one scale and zero point for each row, or for each of (N, G)."""
    if len(scale.shape) == 1:
        return (value - zero[:, None]) * scale[:, None] if F.zero else value * scale[:, None]
    else:
        by_group = tl.reshape(value, (value.shape[0], scale.shape[1], value.shape[1] // scale.shape[1]))
        if F.zero:
            by_group = by_group - zero[:, :, None]
        return tl.reshape(by_group * scale[:, :, None], (value.shape[0], value.shape[1]))


@triton.jit(do_not_specialize=["COUNT"])
def decode_rows(
    q_ptr: tl.tensor, s_ptr: tl.tensor, z_ptr: tl.tensor, ss_ptr: tl.tensor, sz_ptr: tl.tensor, table_ptr: tl.tensor,
    ids_ptr: tl.tensor, y_ptr: tl.tensor,
    COUNT: tl.tensor, N: tl.tensor, C: tl.tensor, R: tl.tensor, SC: tl.tensor, NS: tl.tensor, SE: tl.tensor, NE: tl.tensor,
    F: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """Rows of a stack of matrices to floats: the rows `ids` of one matrix, or all COUNT of them. Sizes as in `Plan`."""
    begin(EARLY)
    out = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK
    row = tl.minimum(out, COUNT - 1)
    if ids_ptr is not None:
        row = tl.load(ids_ptr + row).to(tl.int64)
    matrix, n = row // N, row % N
    value = values(codes_tile(q_ptr, row * R, k, R, F, BK, EVEN), table_ptr, F)
    g = groups_at(k, SC, F, BK)
    scale_row = n // F.scale_rows
    at = place(matrix * SE + scale_row * SC, g, F, BK)
    nest_at = place(matrix * NE + scale_row // F.nest_rows * NS, g // F.nest_columns, F, BK)
    scale = read_scale(tl.load(s_ptr + at), ss_ptr, sz_ptr, nest_at, F)
    zero = scale
    if F.zero:
        zero = tl.load(z_ptr + at).to(tl.float32)
    value = scaled(value, scale, zero, F)
    if y_ptr.dtype.element_ty == tl.float16:  # what is finite stays finite
        value = tl.where((value > 65504.0) & (value < float("inf")), 65504.0, value)
        value = tl.where((value < -65504.0) & (value > float("-inf")), -65504.0, value)
    column = k + tl.arange(0, BK)
    tl.store(
        y_ptr + (out[:, None] * C + column[None, :]), value.to(y_ptr.dtype.element_ty),
        mask=(out < COUNT)[:, None] & (column < C)[None, :],
    )  # fmt: skip


# -- on the host ------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("lowp", "FRAGMENT")
_LIBRARY.define(
    "decode(Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? scale_scale, Tensor? scale_zero_point, Tensor? ids, "
    "str scheme, SymInt columns, ScalarType dtype) -> Tensor"
)


@functools.cache
def table_of(scheme: str, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The values of a codebook by code, None for other elements."""
    element = Scheme.parse(scheme).weight.element
    return element.table(device).to(dtype) if element.kind == "codebook" else None


def _decode(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, scale_scale: Tensor | None, scale_zero_point: Tensor | None,
    ids: Tensor | None, scheme: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    lead = tuple(qdata.shape[:-1])
    p = plan(scheme, (*lead, columns))
    y = torch.empty((*(lead if ids is None else ids.shape), columns), dtype=computed_in(dtype), device=qdata.device)
    count = y.numel() // max(columns, 1)
    if count:
        launch_packed(
            decode_rows, (-(-count // 32), -(-columns // 128)),
            (qdata, scale, zero_point, scale_scale, scale_zero_point, table_of(scheme, torch.float32, qdata.device), ids, y),
            (count, p.rows, columns, p.row_units, p.scale_columns, p.nest_columns, p.scales, p.nests),
            {"F": p.numbers, "BN": 32, "BK": 128, "EVEN": columns % 128 == 0},
            key=(scheme, lead, columns, dtype, ids is None or ids.dtype), warps=4, stages=1,
        )  # fmt: skip
    return y.to(dtype)


def _decode_fake(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, scale_scale: Tensor | None, scale_zero_point: Tensor | None,
    ids: Tensor | None, scheme: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return qdata.new_empty((*(qdata.shape[:-1] if ids is None else ids.shape), columns), dtype=dtype)


register(_LIBRARY, "decode", _decode, _decode_fake)


def decode(packed: Packed, spec: Spec, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
    """The values of a packed weight in the plain layout, bit for bit `numerics.dequantize`.

    Args:
        packed, spec: (..., N, K). dtype: float32, bfloat16 or float16. ids: rows of a matrix to decode, integers of any shape.

    Returns:
        (..., N, K), or (*ids.shape, K), in `dtype`.
    """
    ids = None if ids is None else ids.contiguous()
    return torch.ops.lowp.decode(*parts_of(packed), ids, spec.scheme, spec.shape[-1], dtype)


KERNELS = ()
