"""An element: one scalar number format of at most 8 bits, or an identity float.

An element of b bits *is* its table of 2**b values; decoding is a look-up and encoding finds the nearest value. Both are
derived from the table, so one mechanism serves integers, small floats and codebooks:

    decode(code) = table[code]
    encode(x)    = the code whose value is nearest to x        (ties as the element says)

A small float with E exponent bits, M mantissa bits and bias B holds, with sign s,

    (-1)^s * 2^(e - B) * (1 + m / 2^M)      e > 0
    (-1)^s * 2^(1 - B) * (    m / 2^M)      e = 0, subnormal

and some codes may stand for infinity or NaN (`specials`). Sources: OCP 8-bit Floating Point Specification (OFP8) section 5,
OCP Microscaling Formats (MX) v1.0 section 5.3, and for the "fnuz" variants Noune et al., arXiv 2206.02915.

How the nearest value is found. Between two neighbouring values lies one boundary; a number on or above it takes the upper
value. The tie rule moves into the boundary: where a tie belongs to the lower value, the boundary is the next larger float32.
Signed floats are encoded by magnitude, and the sign bit is added after, so that -0.0 stays -0.0.

`encode_by_table` is that search, for every element. `encode` is a faster way to the same code, and the tests compare the two:
torch's own cast after clamping where torch has the dtype (`native`), rounding for integers, arithmetic for float4 and float6,
one look-up for codebooks (`buckets.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .buckets import Buckets, buckets_of


@dataclass(frozen=True, kw_only=True)
class Element:
    """One scalar number format.

    Args:
        name: its spelling, such as "int4" or "e4m3".
        bits: bits of one code, 1 to 8; 16 or 32 for the identity floats.
        kind: "int" (two's complement or unsigned), "float" (sign, exponent, mantissa), "codebook" (a list of values),
            or "identity" (the float itself, never coded).
        ebits, mbits, bias: the fields of a float.
        signed: whether it holds negative values.
        specials: "none", "ieee" (all-ones exponent is infinity or NaN), "fn" (all ones is NaN, no infinity),
            "fnuz" (only the code of -0 is NaN), "nan" (only the all-ones code is NaN, no sign: e8m0).
        codebook: the values by code, for kind "codebook".
        limits: smallest and largest integer, where they are not those of the bits (ternary).
        native: torch's dtype of the same codes, if torch has one.
        ties: where a number half way between two values goes: "even" (code), "up" or "down".
        source: paper or standard, with section.

    Example:
        >>> ELEMENTS["e2m1"].max
        6.0
    """

    name: str
    bits: int
    kind: str
    ebits: int = 0
    mbits: int = 0
    bias: int = 0
    signed: bool = True
    specials: str = "none"
    codebook: tuple[float, ...] | None = None
    limits: tuple[int, int] | None = None
    native: torch.dtype | None = None
    ties: str = "even"
    source: str = ""

    def __post_init__(self) -> None:
        if (
            self.kind != "identity"
        ):  # now: until Python 3.12 the first look takes a lock, which torch.compile cannot trace
            _ = self.values, self.min, self.max, self.largest, self.emax, self.tiny, self.reach, self._lists
            _ = self.buckets

    # -- the table ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def values(self) -> tuple[float, ...]:
        """The value of each code, as Python floats; NaN where a code has none."""
        if self.kind == "identity":
            raise TypeError(f"{self.name} is an identity float: it has no table")
        return tuple(self._value(code) for code in range(2**self.bits))

    def _value(self, code: int) -> float:
        if self.codebook is not None:
            return self.codebook[code]
        if self.kind == "int":
            value = code - 2**self.bits if self.signed and code >= 2 ** (self.bits - 1) else code
            return float(value) if self.qmin <= value <= self.qmax else math.nan
        sign = -1.0 if self.signed and code >> (self.bits - 1) else 1.0
        exponent = (code >> self.mbits) & (2**self.ebits - 1)
        mantissa = code & (2**self.mbits - 1)
        if self._is_nan(code, exponent, mantissa):
            return math.nan
        if self.specials == "ieee" and exponent == 2**self.ebits - 1:
            return sign * math.inf
        if exponent == 0 and self.specials != "nan":  # e8m0 has no subnormals and no zero
            return sign * mantissa * 2.0 ** (1 - self.bias - self.mbits)
        return sign * (2**self.mbits + mantissa) * 2.0 ** (exponent - self.bias - self.mbits)

    def _is_nan(self, code: int, exponent: int, mantissa: int) -> bool:
        all_ones = exponent == 2**self.ebits - 1
        return {
            "none": False,
            "ieee": all_ones and mantissa != 0,
            "fn": all_ones and mantissa == 2**self.mbits - 1,
            "fnuz": code == 2 ** (self.bits - 1),
            "nan": all_ones,
        }[self.specials]

    @property
    def qmin(self) -> int:
        """Smallest integer of an "int" element."""
        return self.limits[0] if self.limits else (-(2 ** (self.bits - 1)) if self.signed else 0)

    @property
    def qmax(self) -> int:
        """Largest integer of an "int" element."""
        return self.limits[1] if self.limits else 2 ** (self.bits - int(self.signed)) - 1

    @functools.cached_property
    def max(self) -> float:
        """Largest finite value. For e4m3 it is 448 = 1.75 * 2**8."""
        return max(value for value in self.values if math.isfinite(value))

    @functools.cached_property
    def min(self) -> float:
        """Smallest (most negative) finite value."""
        return min(value for value in self.values if math.isfinite(value))

    @functools.cached_property
    def largest(self) -> float:
        """The magnitude that absmax scales to: `max`, or -`min` where nothing is positive (int1 holds {-1, 0})."""
        return self.max if self.max > 0 else -self.min

    @functools.cached_property
    def emax(self) -> int:
        """Exponent of the largest power of two that it holds: floor(log2(largest))."""
        return math.floor(math.log2(self.largest))

    @functools.cached_property
    def tiny(self) -> float:
        """Smallest positive normal value of a float."""
        return 2.0 ** (1 - self.bias) if self.specials != "nan" else 2.0**-self.bias

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """The numbers that rounding alone brings to the outermost values: half a step beyond them, both ends included.

        What lies further out is clamped. A thousandth of a step is added, so that the last bit of a quotient never decides.

        >>> ELEMENTS["int4"].reach
        (-8.501, 7.501)
        """
        if self.kind == "identity":
            return -math.inf, math.inf
        ordered = sorted({value for value in self.values if math.isfinite(value)})
        low, high = ordered[1] - ordered[0], ordered[-1] - ordered[-2]
        return ordered[0] - 0.501 * low, ordered[-1] + 0.501 * high

    # -- storage ------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of unpacked `qdata`: torch's own where it exists, else int8 (signed integers) or uint8 (codes)."""
        if self.native is not None:
            return self.native
        return torch.int8 if self.kind == "int" and self.signed else torch.uint8

    def to_codes(self, qdata: Tensor) -> Tensor:
        """Unpacked qdata (dtype `self.dtype`) to raw codes (uint8, 0 <= code < 2**bits), same shape."""
        codes = qdata if qdata.dtype == torch.uint8 else qdata.view(torch.uint8)
        return codes if self.bits == 8 else codes & (2**self.bits - 1)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Raw codes (uint8) to unpacked qdata (dtype `self.dtype`), same shape: the inverse of `to_codes`."""
        if self.kind != "int" or not self.signed or self.bits == 8:
            return codes if self.dtype == torch.uint8 else codes.view(self.dtype)
        shift = 8 - self.bits  # the sign bit goes to the top and is drawn down again
        return (codes << shift).view(torch.int8) >> shift

    # -- decode and encode --------------------------------------------------------------------------------------------

    def decode(self, qdata: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of unpacked qdata, same shape, in `dtype`.

        >>> ELEMENTS["e2m1"].decode(torch.tensor([7], dtype=torch.uint8))
        tensor([6.])
        """
        if self.kind in ("int", "identity") or self.native is not None:
            return qdata.to(dtype)
        table = self.table(qdata.device).to(dtype)
        return table.index_select(0, qdata.to(torch.int32).flatten()).reshape(qdata.shape)

    def encode(self, x: Tensor, *, saturate: bool = True) -> Tensor:
        """The nearest value of each number, as unpacked qdata of dtype `self.dtype`, same shape as x.

        Args:
            x: any shape, float32 (smaller floats are widened, float64 is narrowed last).
            saturate: clamp to the largest finite value; otherwise overflow becomes infinity or NaN as the element has it, by the
                table: what torch's cast does with it changed in torch 2.13.

        >>> ELEMENTS["int4"].encode(torch.tensor([1.5, 2.5, 99.0]))
        tensor([2, 2, 7], dtype=torch.int8)
        """
        if self.kind == "identity":
            return x.to(self.native)
        x = x.to(torch.float32)
        if self.kind == "int":
            return x.round().clamp(self.qmin, self.qmax).to(self.dtype)
        if self.native is not None and saturate:
            return x.clamp(self.min, self.max).to(self.native)
        if self.kind == "float" and self.specials == "none":
            return self._encode_float(x)
        if self.buckets is not None:
            return self._encode_by_bucket(x, self.buckets)
        return self.from_codes(self.encode_by_table(x, saturate=saturate))

    def _encode_by_bucket(self, x: Tensor, buckets: Buckets) -> Tensor:
        """One look-up: see `buckets.py`."""
        bits = torch.where(x.isnan(), math.inf, x).view(torch.int32)
        magnitude = bits & 0x7FFFFFFF if buckets.first else bits
        key = magnitude.clamp(buckets.base, buckets.top).sub_(buckets.base)
        if buckets.first:
            key ^= bits >> 31
        bucket = (key >> buckets.shift).add_(buckets.first)
        words = _constant(self, "buckets", x.device).index_select(0, bucket.flatten()).view(x.shape)
        return words.add_(key).bitwise_right_shift_(buckets.shift).to(torch.uint8)

    def _encode_float(self, x: Tensor) -> Tensor:
        """Round to nearest even by arithmetic: the step between values is 2**(e - mbits) for a number of exponent e."""
        magnitude = x.abs()
        magnitude = torch.where(magnitude < self.max, magnitude, self.max)
        lowest = (
            128 - self.bias
        )  # of the smallest normal value, biased as float32's exponents are; the subnormals share its step
        exponent = (magnitude.view(torch.int32) >> 23).clamp_(min=lowest)
        inverse_step = ((254 + self.mbits - exponent) << 23).view(torch.float32)
        steps = magnitude.mul_(inverse_step).round_().to(torch.int32)
        codes = steps.add_(exponent.sub_(lowest) << self.mbits).to(torch.uint8)
        return codes | torch.signbit(x).to(torch.uint8) << (self.bits - 1)

    def encode_by_table(self, x: Tensor, *, saturate: bool = True) -> Tensor:
        """As `encode`, by the table alone, for every element; answers raw codes (uint8)."""
        x = x.to(torch.float32)
        codes_by_rank, boundaries = self._search(x.device)
        magnitude = x.abs() if self._by_sign else x
        rank = torch.bucketize(magnitude, boundaries, right=True, out_int32=True)
        if saturate:
            rank = rank.clamp(max=len(codes_by_rank) - 2)  # the last rank is overflow
        codes = codes_by_rank.index_select(0, rank.flatten()).reshape(x.shape)
        if self._by_sign:
            sign = torch.signbit(x).to(torch.uint8) << (self.bits - 1)
            if self.specials == "fnuz":
                sign = torch.where(codes == 0, 0, sign)  # the code of -0 is NaN there
            codes = codes | sign
        if self._nan_code is not None:
            codes = torch.where(x.isnan(), self._nan_code | (codes & 0x80 if self.specials != "fnuz" else 0), codes)
        return codes.to(torch.uint8)

    def encode_stochastic(self, x: Tensor, noise: Tensor) -> Tensor:
        """Stochastic rounding: up with probability (x - below) / (above - below), so that the mean error is zero.

        Args:
            x: any shape, float32. noise: same shape, uniform in [0, 1).

        Source: Gupta et al., arXiv 1502.02551, section 3.1.
        """
        if self.kind == "identity":
            return self._round_float(x, noise)
        ordered = self._ordered(x.device)
        x = x.clamp(self.min, self.max)
        below = torch.searchsorted(ordered, x.contiguous(), right=True).sub_(1).clamp_(0, len(ordered) - 2)
        low, high = ordered[below], ordered[below + 1]
        return self.encode(torch.where(noise < (x - low) / (high - low), high, low))

    def _round_float(self, x: Tensor, noise: Tensor) -> Tensor:
        """Stochastic rounding to bf16 or fp16: neighbouring floats are neighbouring integers, sign aside."""
        if self.native is None or self.bits == 32:
            return x
        nearest = x.to(self.native)
        codes = nearest.view(torch.int16)
        codes = torch.where(nearest.to(torch.float32).abs() > x.abs(), codes - 1, codes)
        below, above = codes.view(self.native).to(torch.float32), (codes + 1).view(self.native).to(torch.float32)
        away = noise < (x - below) / (above - below)
        return torch.where(away, codes + 1, codes).view(self.native)

    @functools.cached_property
    def buckets(self) -> Buckets | None:
        """How a codebook in rising order is encoded by one look-up; None for other elements."""
        codes, boundaries = self._lists
        if self.kind != "codebook" or codes[:-1] != tuple(range(len(codes) - 1)):
            return None
        return buckets_of(boundaries[:-1], self.signed, max(self.max, -self.min))  # the last is overflow

    @functools.cached_property
    def _lists(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        return _search_lists(self)

    @property
    def _by_sign(self) -> bool:
        return self.kind == "float" and self.signed

    @property
    def _nan_code(self) -> int | None:
        if self.specials == "none":
            return None
        codes = [code for code, value in enumerate(self.values) if math.isnan(value)]
        return codes[-1] & 0x7F if self.specials in ("ieee", "fn") else codes[0]  # torch's own NaN is all ones

    def table(self, device: torch.device) -> Tensor:
        """The values by code, float32, shape (2**bits,), on `device`."""
        return _constant(self, "table", device)

    def _search(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _constant(self, "ranked codes", device), _constant(self, "boundaries", device)

    def _ordered(self, device: torch.device) -> Tensor:
        return _constant(self, "ordered", device)


def _search_lists(element: Element) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Codes in order of value, and the boundary below each but the first; the last rank is overflow."""
    ranked = sorted(
        (value, code)
        for code, value in enumerate(element.values)
        if math.isfinite(value) and not (element._by_sign and code >> (element.bits - 1))
    )
    overflow_value = 2 * ranked[-1][0] - ranked[-2][0]
    ranked.append((overflow_value, _overflow_code(element, ranked[-1][1])))
    pairs = list(itertools.pairwise(ranked))
    middles = torch.tensor([(low + high) / 2 for (low, _), (high, _) in pairs], dtype=torch.float32, device="cpu")
    up = [element.ties == "up" or (element.ties == "even" and code % 2 == 0) for _, (_, code) in pairs]
    above = torch.nextafter(middles, torch.full_like(middles, math.inf))
    boundaries = torch.where(torch.tensor(up, device="cpu"), middles, above)
    return tuple(code for _, code in ranked), tuple(boundaries.tolist())


def _overflow_code(element: Element, top_code: int) -> int:
    """What lies above the largest finite value: infinity or NaN where the element has one, else the largest itself."""
    if element.specials in ("ieee", "fn", "nan"):
        return top_code + 1
    return 2 ** (element.bits - 1) if element.specials == "fnuz" else top_code


def _build(element: Element, what: str, device: torch.device) -> Tensor:
    if what == "table":
        return torch.tensor(element.values, dtype=torch.float32, device=device)
    if what == "ordered":
        finite = sorted({value for value in element.values if math.isfinite(value)})
        return torch.tensor(finite, dtype=torch.float32, device=device)
    if what == "buckets" and element.buckets is not None:
        return torch.tensor(element.buckets.words, dtype=torch.int32, device=device)
    codes, boundaries = element._lists
    if what == "ranked codes":
        return torch.tensor(codes, dtype=torch.uint8, device=device)
    return torch.tensor(boundaries, dtype=torch.float32, device=device)


_CONSTANTS: dict[tuple[str, str, str], Tensor] = {}


def _constant(element: Element, what: str, device: torch.device) -> Tensor:
    """A small table on a device, kept once made. While a graph is traced nothing is kept: a fake tensor would poison."""
    key = (element.name, what, str(device))
    if torch.compiler.is_dynamo_compiling():
        return _CONSTANTS[key] if key in _CONSTANTS else _build(element, what, device)
    if torch._C._len_torch_dispatch_stack() > 0:
        return _build(element, what, device)
    if key not in _CONSTANTS:
        with torch.inference_mode(False):
            _CONSTANTS[key] = _build(element, what, device)
    return _CONSTANTS[key]
