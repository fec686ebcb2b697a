"""Optimizer steps in one pass over memory and one launch for a list of parameters.

A program takes a tile of one parameter: it reads param, gradient, codes and scales, decodes, updates in float32, finds each
block's new scale, encodes, and writes. Which tile stands in two tables on the device:

    work   (programs, 2)   int32    the parameter, the tile in it                             made once for a list of slots
    table  (parameters, F) int64    pointers of param, gradient, codes, scales; elements, key, start     made for gradients

so a thousand parameters are one launch, and one short copy where their gradients have moved. A table is never written again: a
graph that was captured, or another stream, may still read it.

What makes it cheap:
  - A codebook is decoded by one look-up among its values and encoded by one look-up among its buckets (`numerics/buckets.py`),
    in shared memory: 7 integer operations instead of 8 steps of a search.
  - x / scale is x * low + x * high rounded once, with 1 / scale in two floats: IEEE's quotient in two instructions (Brisebarre,
    Muller, "Correctly rounded multiplication by arbitrary precision constants", IEEE TC 57(2), 2008). So codes and scales are the
    bytes of `numerics.quantize`; only the parameter, with the hardware's square root and quotient, may differ in its last bit.
    (A scale above 2**100 has no such inverse: there a code beside a boundary may differ.)
  - Nothing asks the host: the numbers of the step are arguments, or a tensor where the device counts.

Noise is drawn for 8 elements at once, see `lowp.ops.update`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import Format
from ...ops.registry import Case, Kernel, device_capability
from ...ops.update import ELEMENTWISE, Coefficients, Slot, Step, formats_of, why_not_flat
from . import interpreted, why_not_portable
from .launch import begin, capturing, launch
from .rounding import TINY, at_least, bits_of, encode_float, float_of, to_bf16, widen

_NO_FMA = tl.constexpr(interpreted())
FLOAT, CODEBOOK, NATIVE, ARITHMETIC = 0, 1, 2, 3  # how a state is coded; the two last are small floats
_FIELDS = tl.constexpr(11)  # of a row of the table
_LARGEST_BLOCK = 2048
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _pointer(row_ptr, FIELD: tl.constexpr, TYPE: tl.constexpr, W: tl.constexpr):
    """A pointer of the table to numbers of which W are read at once."""
    return tl.multiple_of(tl.load(row_ptr + FIELD).to(tl.pointer_type(TYPE)), W * TYPE.primitive_bitwidth // 8)


@triton.jit
def _spread(per_block, N: tl.constexpr, G: tl.constexpr):
    """One number for each block, for all of its elements."""
    return tl.broadcast_to(per_block[:, None], (N // G, G)).reshape((N,))


@triton.jit
def _table_of(ptr, SIZE: tl.constexpr, KIND: tl.constexpr):
    """The numbers of a table in registers, spread over the threads; nothing where a format has none."""
    if KIND == 1:
        return tl.load(ptr + tl.arange(0, SIZE))
    else:
        return 0


@triton.jit
def _fetch(
    row_ptr, FIELD: tl.constexpr, at, mask, blocks, N: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    TYPE: tl.constexpr, W: tl.constexpr, first,
):  # fmt: skip
    """A state at a tile as it lies in memory: codes (or floats) and scales. first is the tile's first block, blocks how many
    there are."""
    if KIND == 0:
        return tl.load(_pointer(row_ptr, FIELD, TYPE, W) + at, mask=mask, other=0.0), 1.0
    else:
        block = first + tl.arange(0, N // G)
        scale = tl.load(_pointer(row_ptr, FIELD + 1, tl.float32, 1) + block, mask=block < blocks, other=1.0)
        if BITS == 4:
            half = first * (G // 2) + tl.arange(0, N // 2)
            packed_ptr = _pointer(row_ptr, FIELD, tl.uint8, (W + 1) // 2)
            return tl.load(packed_ptr + half, mask=half < blocks * (G // 2), other=0), scale
        else:
            return tl.load(_pointer(row_ptr, FIELD, tl.uint8, W) + at, mask=mask, other=0), scale


@triton.jit
def _decoded(
    codes, scale, values, N: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr
):
    """The values of what `_fetch` found; `values` of all codes."""
    if KIND == 0:
        return widen(codes)
    else:
        if BITS == 4:
            codes = tl.join(codes & 15, codes >> 4).reshape((N,))
        if KIND == 1:
            return tl.gather(values, codes.to(tl.int32), 0) * _spread(scale, N, G)
        else:
            return codes.to(TYPE, bitcast=True).to(tl.float32) * _spread(scale, N, G)


@triton.jit
def _asm(x, TEXT: tl.constexpr):
    """One instruction of the hardware's on a float32."""
    return tl.inline_asm_elementwise(TEXT, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _quotient(x, scale, N: tl.constexpr, G: tl.constexpr, PART: tl.constexpr):
    """x / scale, rounded as IEEE rounds. PART: of 0 to 1, what is below or NaN becomes 0."""
    if _NO_FMA:
        q = tl.div_rn(x, _spread(scale, N, G))
        return tl.where(q == q, tl.minimum(tl.maximum(q, 0.0), 1.0), 0.0) if PART else q
    else:
        high = _asm(scale, "rcp.approx.f32 $0, $1;")
        high = tl.fma(tl.fma(-high, scale, 1.0), high, high)
        low = x * _spread(tl.fma(-high, scale, 1.0) * high, N, G)
        high = _spread(high, N, G)
        if PART:
            return tl.inline_asm_elementwise(
                "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, high, low], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            return tl.fma(x, high, low)


@triton.jit
def _scale(amax, LARGEST: tl.constexpr, INVERSE: tl.constexpr, REST: tl.constexpr):
    """amax / LARGEST, at least the smallest normal float; INVERSE + REST = 1 / LARGEST."""
    if LARGEST == 1.0:
        return at_least(amax, TINY)
    elif _NO_FMA:
        return at_least(tl.div_rn(amax, LARGEST), TINY)
    else:
        return at_least(tl.fma(amax, INVERSE, amax * REST), TINY)


@triton.jit
def _codes(
    x, size, scale, words, N: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr,
    SHIFT: tl.constexpr, BASE: tl.constexpr, FIRST: tl.constexpr, WORDS: tl.constexpr, MBITS: tl.constexpr,
    LOWEST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The codes (uint8) of the values nearest to x / scale; size is |x|."""
    if KIND == 1:
        if FIRST:
            key = tl.maximum(bits_of(_quotient(size, scale, N, G, True)) - BASE, 0) ^ (bits_of(x) >> 31)
        else:
            key = tl.maximum(bits_of(_quotient(x, scale, N, G, True)) - BASE, 0)
        word = tl.gather(words, (key >> SHIFT) + FIRST, 0)
        return ((word + key) >> SHIFT).to(tl.uint8)
    elif KIND == 2:
        return _quotient(x, scale, N, G, False).to(TYPE).to(tl.uint8, bitcast=True)
    else:
        code, _ = encode_float(_quotient(x, scale, N, G, False), MBITS, LOWEST, LARGEST, BITS, True)
        return code


@triton.jit
def _write(
    row_ptr, FIELD: tl.constexpr, POSITIVE: tl.constexpr, words, x, at, mask, blocks, N: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr, SHIFT: tl.constexpr, BASE: tl.constexpr, FIRST: tl.constexpr,
    WORDS: tl.constexpr, MBITS: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr, INVERSE: tl.constexpr,
    REST: tl.constexpr, W: tl.constexpr, first,
):  # fmt: skip
    """A state's new values, quantized. POSITIVE: none is negative."""
    if KIND == 0:
        _store(_pointer(row_ptr, FIELD, TYPE, W), x, at, mask)
    else:
        size = x
        if not POSITIVE or _NO_FMA:  # a CPU's NaN may be negative
            size = float_of(bits_of(x) & 0x7FFFFFFF)
        amax = float_of(tl.max(bits_of(size).reshape((N // G, G)), axis=1))
        scale = _scale(amax, LARGEST, INVERSE, REST)
        block = first + tl.arange(0, N // G)
        tl.store(_pointer(row_ptr, FIELD + 1, tl.float32, 1) + block, scale, mask=block < blocks)
        codes = _codes(x, size, scale, words, N, G, KIND, BITS, TYPE, SHIFT, BASE, FIRST, WORDS, MBITS, LOWEST, LARGEST)
        if BITS == 4:
            low, high = tl.split(codes.reshape((N // 2, 2)))
            half = first * (G // 2) + tl.arange(0, N // 2)
            packed_ptr = _pointer(row_ptr, FIELD, tl.uint8, (W + 1) // 2)
            tl.store(packed_ptr + half, low | (high << 4), mask=half < blocks * (G // 2))
        else:
            tl.store(_pointer(row_ptr, FIELD, tl.uint8, W) + at, codes, mask=mask)


@triton.jit
def _store(ptr, x, at, mask):
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr + at, to_bf16(x), mask=mask)
    else:
        tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _noisy(x, first, key, seed, step, N: tl.constexpr):
    """x as bf16 bits (int16), rounded up with the probability of what is cut off."""
    group = first // 8 + tl.arange(0, N // 8)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(
        (step.to(tl.int64) << 32) | (seed.to(tl.int64) & 0xFFFFFFFF), low, high, zero + key.to(tl.uint32), zero, 7
    )
    words = tl.join(tl.join(a, b), tl.join(c, d))  # in memory a, c, b, d
    drawn = tl.join(words & 0xFFFF, words >> 16).reshape((N,)).to(tl.int32)
    bits = bits_of(x)
    lost = (bits & 0x7FFFFFFF) >= 0x7F800000
    quiet = (bits | ((bits & 0x7FFFFFFF) > 0x7F800000).to(tl.int32) * 0x400000) >> 16
    return tl.where(lost, quiet, (bits + drawn) >> 16).to(tl.int16)


@triton.jit
def _direction(m, v, root, eps):
    """m / (sqrt(v) root + eps)"""
    if _NO_FMA:
        return tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    else:
        return m * _asm(tl.fma(_asm(v, "sqrt.approx.ftz.f32 $0, $1;"), root, eps), "rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def _moved(p, direction, decay, rate):
    """decay p - rate direction"""
    if _NO_FMA:
        return p * decay - direction * rate
    else:
        return tl.fma(direction, -rate, p * decay)


@triton.jit(
    do_not_specialize=[
        "decay",
        "rate",
        "root",
        "first",
        "beta1",
        "keep1",
        "beta2",
        "keep2",
        "eps",
        "weight_decay",
        "step",
        "seed",
    ],
    do_not_specialize_on_alignment=["scale_ptr", "found_ptr", "numbers_ptr"],
)
def _update_kernel(
    table_ptr, work_ptr, values0_ptr, words0_ptr, values1_ptr, words1_ptr, numbers_ptr, scale_ptr, found_ptr,
    decay, rate, root, first, beta1, keep1, beta2, keep2, eps, weight_decay, step, seed,
    RULE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    ALIGNED: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, COUPLED: tl.constexpr, NESTEROV: tl.constexpr,
    NOISE: tl.constexpr, NUMBERS: tl.constexpr, SCALED: tl.constexpr, FOUND: tl.constexpr,
    KIND0: tl.constexpr, BITS0: tl.constexpr, TYPE0: tl.constexpr, SHIFT0: tl.constexpr, BASE0: tl.constexpr,
    FIRST0: tl.constexpr, WORDS0: tl.constexpr, MBITS0: tl.constexpr, LOWEST0: tl.constexpr, LARGEST0: tl.constexpr,
    INVERSE0: tl.constexpr, REST0: tl.constexpr,
    KIND1: tl.constexpr, BITS1: tl.constexpr, TYPE1: tl.constexpr, SHIFT1: tl.constexpr, BASE1: tl.constexpr,
    FIRST1: tl.constexpr, WORDS1: tl.constexpr, MBITS1: tl.constexpr, LOWEST1: tl.constexpr, LARGEST1: tl.constexpr,
    INVERSE1: tl.constexpr, REST1: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of N elements, blocks of G. RULE: 0 adam, 1 sgd, 2 lion. P, Q: dtypes of parameter and gradient. W: elements that
    a thread reads at once."""
    begin(EARLY)
    if FOUND:  # noqa: SIM102 -- decided when it is compiled
        if tl.load(found_ptr) != 0.0:
            return
    if NUMBERS:
        decay, rate, root = tl.load(numbers_ptr), tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
        first, step = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4).to(tl.int32)
    row_ptr = table_ptr + tl.load(work_ptr + tl.program_id(0) * 2).to(tl.int64) * _FIELDS
    tile = tl.load(work_ptr + tl.program_id(0) * 2 + 1).to(tl.int64)
    count = tl.load(row_ptr + 8)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    at = tile * N + tl.arange(0, N)
    mask = at < count
    block, blocks = tile * (N // G), count // G
    p_ptr = _pointer(row_ptr, 0, P, W)
    p = widen(tl.load(p_ptr + at, mask=mask, other=0.0))
    g = widen(tl.load(_pointer(row_ptr, 1, Q, W) + at, mask=mask, other=0.0))
    # All loads before the first look-up: that has a barrier, behind which a load would be waited for once more.
    codes0, scale0 = _fetch(row_ptr, 2, at, mask, blocks, N, G, KIND0, BITS0, TYPE0, W, block)
    values0 = _table_of(values0_ptr, 1 << BITS0, KIND0)
    if RULE == 0:
        codes1, scale1 = _fetch(row_ptr, 4, at, mask, blocks, N, G, KIND1, BITS1, TYPE1, W, block)
        values1 = _table_of(values1_ptr, 1 << BITS1, KIND1)
        if AMSGRAD:
            codes2, scale2 = _fetch(row_ptr, 6, at, mask, blocks, N, G, KIND1, BITS1, TYPE1, W, block)
        words1 = _table_of(words1_ptr, WORDS1, KIND1)
        v = _decoded(codes1, scale1, values1, N, G, KIND1, BITS1, TYPE1)
    m = _decoded(codes0, scale0, values0, N, G, KIND0, BITS0, TYPE0)

    words0 = _table_of(words0_ptr, WORDS0, KIND0)

    if SCALED:
        g = g * tl.div_rn(1.0, tl.load(scale_ptr).to(tl.float32))
    if MAXIMIZE:
        g = -g
    if COUPLED:
        g = g + p * weight_decay

    if RULE == 0:
        m = m + (g - m) * keep1
        v = v * beta2 + g * g * keep2
        top = v
        if AMSGRAD:
            top = tl.maximum(_decoded(codes2, scale2, values1, N, G, KIND1, BITS1, TYPE1), v)
            _write(
                row_ptr, 6, True, words1, top, at, mask, blocks, N, G, KIND1, BITS1, TYPE1, SHIFT1, BASE1, FIRST1, WORDS1,
                MBITS1, LOWEST1, LARGEST1, INVERSE1, REST1, W, block,
            )  # fmt: skip
        p = _moved(p, _direction(m, top, root, eps), decay, rate)
        _write(
            row_ptr, 4, True, words1, v, at, mask, blocks, N, G, KIND1, BITS1, TYPE1, SHIFT1, BASE1, FIRST1, WORDS1, MBITS1,
            LOWEST1, LARGEST1, INVERSE1, REST1, W, block,
        )  # fmt: skip
    elif RULE == 1:
        m = m * beta1 + g * first
        if NESTEROV:
            p = _moved(p, g + m * beta1, decay, rate)
        else:
            p = _moved(p, m, decay, rate)
    else:
        u = m * beta1 + g * keep1
        p = p * decay - tl.where(u > 0, rate, tl.where(u < 0, -rate, 0.0))
        m = m * beta2 + g * keep2
    _write(
        row_ptr, 2, False, words0, m, at, mask, blocks, N, G, KIND0, BITS0, TYPE0, SHIFT0, BASE0, FIRST0, WORDS0, MBITS0,
        LOWEST0, LARGEST0, INVERSE0, REST0, W, block,
    )  # fmt: skip
    if NOISE:
        noisy = _noisy(p, tile * N + tl.load(row_ptr + 10), tl.load(row_ptr + 9), seed, step, N)
        tl.store(p_ptr + at, noisy.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        _store(p_ptr, p, at, mask)


# -- what is fixed for a list of parameters ---------------------------------------------------------------------------


@functools.cache
def _coded(spelling: str, sm: int) -> tuple[Any, ...]:
    """KIND, BITS, TYPE, SHIFT, BASE, FIRST, WORDS, MBITS, LOWEST, LARGEST, INVERSE, REST of a state's format."""
    fmt = Format.parse(spelling)
    element = fmt.element
    if fmt.is_identity:
        return FLOAT, 0, _TYPES[element.dtype], 0, 0, 0, 0, 0, 0, 1.0, 1.0, 0.0
    if element.buckets is not None:
        b = element.buckets
        words = triton.next_power_of_2(len(b.words))
        return CODEBOOK, element.bits, tl.uint8, b.shift, b.base, b.first, words, 0, 0, element.largest, 1.0, 0.0
    native = sm >= 89 and not interpreted() and element.name in ("e4m3", "e5m2")
    held = tl.float8e4nv if element.name == "e4m3" else tl.float8e5
    kind = NATIVE if native else ARITHMETIC
    inverse = float(torch.tensor(1 / element.largest, dtype=torch.float32))
    largest = element.largest, inverse, 1 / element.largest - inverse
    return kind, element.bits, held, 0, 0, 0, 0, element.mbits, 128 - element.bias, *largest


@functools.cache
def _tables(spelling: str, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The values by code and the words by bucket, filled up to powers of two."""
    element = Format.parse(spelling).element
    if element.kind == "identity":
        return None, None
    values = element.table(device)
    if element.buckets is None:
        return values, None
    words = torch.zeros(triton.next_power_of_2(len(element.buckets.words)), dtype=torch.int32)
    words[: len(element.buckets.words)] = torch.tensor(element.buckets.words, dtype=torch.int32)
    return values, words.to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Where parameters, states and gradients lie, on the device; for one stream, or for one graph that was captured.

    Args:
        made_for: the stream and the addresses of the gradients. host: what the device's table is copied from, by a graph at each
            replay. aligned: all of it at multiples of 16 bytes.
    """

    made_for: tuple[int, tuple[int, ...]]
    host: Tensor
    device: Tensor
    aligned: bool


@dataclass(kw_only=True, eq=False)
class Plan:
    """What is known of a list of slots: rows of the table without gradients, work, and the tables in use."""

    slots: list[weakref.ref[Slot]]
    rows: Tensor
    work: Tensor
    aligned: bool
    table: Table | None = None
    captured: list[Table] = field(default_factory=list)


_PLANS: weakref.WeakKeyDictionary[Slot, Plan] = weakref.WeakKeyDictionary()  # by the first slot, as long as that lives


def _host(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the host, in memory from which a GPU copies on its own time."""
    return values.pin_memory() if device.type == "cuda" else values


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _plan(slots: Sequence[Slot], tile: int) -> Plan:
    plan = _PLANS.get(slots[0])
    if plan is None or len(plan.slots) != len(slots) or not all(map(_is, plan.slots, slots)):
        plan = _PLANS[slots[0]] = _made(slots, tile)
    return plan


def _table(plan: Plan, grads: Sequence[Tensor]) -> Table:
    device = plan.work.device
    made_for = _stream(device), tuple(grad.data_ptr() for grad in grads)
    in_graph, known = capturing(device), plan.table
    if known is not None and known.made_for[1] == made_for[1] and (in_graph or known.made_for[0] == made_for[0]):
        if in_graph:  # all streams have been waited for before
            plan.captured.append(known)
        return known
    rows = plan.rows.clone()
    rows[:, 1] = torch.tensor(made_for[1], dtype=torch.int64)
    host = _host(rows, device)
    aligned = plan.aligned and all(pointer % 16 == 0 for pointer in made_for[1])
    table = Table(made_for=made_for, host=host, device=host.to(device, non_blocking=True), aligned=aligned)
    if in_graph:
        plan.captured.append(table)
    else:
        plan.table = table
    return table


def _is(held: weakref.ref[Slot], slot: Slot) -> bool:
    return held() is slot


def _made(slots: Sequence[Slot], tile: int) -> Plan:
    device = slots[0].param.device
    rows, aligned = [], True
    for slot in slots:
        states = [
            packed[name].data_ptr() if name in packed else 0 for packed in slot.states for name in ("qdata", "scale")
        ]
        states += [0] * (6 - len(states))
        count = slot.param.numel()
        row = [slot.param.data_ptr(), 0, *states, count, slot.key, slot.start]
        rows.append(row)
        aligned &= count % 16 == 0 and all(pointer % 16 == 0 for pointer in (row[0], row[2], row[4], row[6]))
    tiles = torch.tensor([-(-slot.param.numel() // tile) for slot in slots])
    which = torch.repeat_interleave(torch.arange(len(slots)), tiles)
    first = torch.repeat_interleave(tiles.cumsum(0) - tiles, tiles)
    work = torch.stack((which, torch.arange(len(which)) - first), dim=1).to(torch.int32)
    return Plan(
        slots=[weakref.ref(slot) for slot in slots],
        rows=torch.tensor(rows, dtype=torch.int64),
        work=_host(work, device).to(device, non_blocking=True),
        aligned=aligned,
    )


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a kernel is cut: elements of a program, its warps, elements that a thread holds side by side, and the most registers
    that a thread may take (0: as many as it wants)."""

    tile: int
    warps: int = 8
    wide: int = 8
    registers: int = 0

    def width(self, four: bool) -> int:
        """Elements side by side; numbers of four bytes are read by fours."""
        return 4 if four else self.wide


def _tiling(formats: Sequence[Format]) -> Tiling:
    """Found on an H200 with `benchmarks/optim.py --tiles`. Maps of 256 values bring 16 KB of buckets each into shared memory, so
    their programs are large; with more than 128 registers only one of 256 threads would fit a multiprocessor, and step alone
    takes half as long again."""
    kinds = {(fmt.element.kind, fmt.element.bits) for fmt in formats}
    if ("codebook", 8) in kinds:
        return Tiling(tile=8192, registers=128)
    if ("codebook", 4) in kinds:
        return Tiling(tile=2048, warps=4, registers=64)
    return Tiling(tile=2048, warps=4, wide=16) if ("float", 8) in kinds else Tiling(tile=2048)


def _block(fmt: Format) -> int:
    return 0 if fmt.is_identity else int(fmt.block.removeprefix("1x"))


def _run(rule: int, step: Step) -> None:
    slot, grad, s, numbers = step.slots[0], step.grads[0], step.settings, step.numbers
    formats = formats_of(slot.scheme)
    group = max(map(_block, formats[: 2 if rule == 0 else 1])) or 256
    tiling = _tiling(formats[: 2 if rule == 0 else 1])
    plan = _plan(step.slots, tiling.tile)
    if not len(plan.work):
        return
    table = _table(plan, step.grads)
    device = slot.param.device
    sm = device_capability(device.type, device.index)
    first, second = str(formats[0]), str(formats[1]) if rule == 0 else "fp32"
    four = torch.float32 in (slot.param.dtype, grad.dtype) or (FLOAT, torch.float32) in (
        (_coded(name, sm)[0], fmt.element.native) for name, fmt in zip((first, second), formats, strict=False)
    )
    coupled = s.weight_decay != 0 and not s.decoupled
    constants = (
        rule, _TYPES[slot.param.dtype], _TYPES[grad.dtype], tiling.tile, group, tiling.width(four) if table.aligned else 1,
        table.aligned, s.amsgrad and rule == 0, s.maximize, coupled, s.nesterov,
        s.seed is not None and slot.param.dtype == torch.bfloat16,
        isinstance(numbers, Tensor), step.grad_scale is not None, step.found_inf is not None,
    )  # fmt: skip
    tensors = (table.device, plan.work, *_tables(first, device), *_tables(second, device))
    host = (
        numbers if isinstance(numbers, Coefficients) else Coefficients(decay=0.0, rate=0.0, root=0.0, first=0.0, step=0)
    )
    floats = (
        host.decay, host.rate, host.root, host.first, s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2, s.eps, s.weight_decay,
    )  # fmt: skip
    seed = (s.seed or 0) & 0xFFFFFFFF
    # One type for each, whatever was given: the compiled kernel is found by a key that does not hold them. So the seed's 32 bits
    # go as a signed number.
    scalars = (*map(float, floats), int(host.step), seed - (seed >> 31 << 32))
    optional = (numbers if isinstance(numbers, Tensor) else None, step.grad_scale, step.found_inf)
    key = ("update", constants, tiling, first, second, device, tuple(x if x is None else x.dtype for x in optional))
    args = (*tensors, *optional, *scalars)
    launch(
        _update_kernel, key, (len(plan.work), 1, 1), args, lambda: (*constants, *_coded(first, sm), *_coded(second, sm)),
        device, tiling.warps, registers=tiling.registers,
    )  # fmt: skip


# -- the table of kernels ---------------------------------------------------------------------------------------------


def _why_not(case: Case) -> str:
    if refused := why_not_portable(case):
        return refused
    if case.extras and case.extras[0] not in ("bfloat16", "float16", "float32"):
        return f"wants gradients of bfloat16, float16 or float32, got {case.extras[0]}"
    formats = formats_of(case.scheme)[:2]
    for fmt in formats:
        if why := why_not_flat(fmt):
            return why
        element = fmt.element
        if not fmt.is_identity and (fmt.scale != "fp32" or fmt.rule != "absmax"):
            return f"wants an fp32 scale by absmax, got {fmt}"
        if element.kind not in ("codebook", "identity") and element.name not in ("e4m3", "e5m2"):
            return f"wants a map of values, e4m3, e5m2 or floats, got {element.name}"
        if element.kind == "codebook" and (element.buckets is None or element.largest != 1.0):
            return f"wants a map in rising order up to 1, got {element.name}"
    blocks = {size for size in map(_block, formats) if size}
    if len(blocks) > 1 or any(size & (size - 1) or not 16 <= size <= _LARGEST_BLOCK for size in blocks):
        return f"wants blocks of one power of two from 16 to {_LARGEST_BLOCK}, got {' and '.join(map(str, sorted(blocks)))}"
    return ""


def _how(case: Case) -> str:
    kinds = []
    for fmt in dict.fromkeys(formats_of(case.scheme)[: 2 if case.op == "adam" else 1]):
        element = fmt.element
        how = "one look-up in shared memory" if element.kind == "codebook" else "the hardware's conversion"
        kinds.append(f"{element.name} {'as it is' if fmt.is_identity else f'by {how}'}")
    return f"one pass, fp32 in registers, {', '.join(kinds)}; all parameters in one launch"


_CASES = ("dyn8/1x256@udyn8/1x256", "dyn4/1x128@ulin4/1x128", "e4m3/1x256", "bf16", "fp32")

KERNELS = tuple(
    Kernel(
        op=rule, name="fused", rank=50, layout="", why_not=_why_not, run=functools.partial(_run, i), how=_how, cases=_CASES,
        about="a list of parameters in one launch and one pass over memory, in Triton",
    )
    for i, rule in enumerate(ELEMENTWISE)
)  # fmt: skip
