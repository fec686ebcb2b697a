"""A format: an element, how many of them share a scale, and how that scale is stored. One spelling everywhere.

    format     := element ["/" block ["*" scale] ["+" zero_point]] ["~" rule]
    block      := "tensor" | "row" | ROWSxCOLUMNS      how many elements share one scale, over the last two axes
    scale      := fp32 (default) | bf16 | fp16 | e8m0 | e4m3 | element "/" block        a scale may itself be quantized
    zero_point := int8 | uint8 | int32 | bf16 | fp16 | fp32
    rule       := how a scale is chosen (see `lowp.numerics.RULES`); spelled only where it is not the format's default
    scheme     := weight format ["@" activation format]                                 "@" absent: weight-only

"tensor" is one scale for a matrix (the last two axes): a stack of expert matrices has one each. "row" is one scale for each
row, which for a weight (N, K) is an output channel and for an activation (M, K) a token. Only identity floats (bf16, fp16,
fp32) stand without a block.

`str` writes what `parse` reads: `str(Format.parse(s)) == s` for every spelling in its shortest form.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass

import torch

from ..errors import MisfitError, SpellingError
from .element import Element
from .formats import ELEMENTS, KNOWN, PRESETS
from .known import Known

_SPELLING = re.compile(
    r"(?P<element>\w+)(?:/(?P<block>tensor|row|\d+x\d+))?(?:\*(?P<scale>\w+(?:/(?:tensor|row|\d+x\d+))?))?(?:\+(?P<zero_point>\w+))?(?:~(?P<rule>\w+))?"
)
SCALE_DTYPES = ("fp32", "bf16", "fp16", "e8m0", "e4m3")  # a scale that is cast; any other is quantized in blocks
ZERO_POINTS = ("int8", "uint8", "int32", "bf16", "fp16", "fp32")
E8M0_RULES = ("floor", "ceil", "even", "rceil")
_ZERO_POINT_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}
_RULES_FOR_ZERO_POINT = ("asymmetric", "mse")
_RULES_SYMMETRIC = ("absmax", "absmean", "symmetric", "noclip", "mse")


@dataclass(frozen=True, kw_only=True)
class Format:
    """One number format of a tensor.

    Args:
        element: the scalar format.
        block: "tensor", "row" or "128x128"; "" for an identity float.
        scale: a name of `SCALE_DTYPES`, or the Format that the scale itself is quantized in.
        zero_point: None (symmetric) or a name of `ZERO_POINTS`.
        rule: how the scale is chosen.
        wraps: a block of one row may run on into the next rows, row-major, and takes at most its size: so the scales of a
            scale are counted (QLoRA).

    Example:
        >>> Format.parse("int4/1x128*bf16").bits((4096, 4096))
        4.125
    """

    element: Element
    block: str
    scale: str | Format = "fp32"
    zero_point: str | None = None
    rule: str = "absmax"
    wraps: bool = False

    @staticmethod
    def parse(spelling: str) -> Format:
        """Read a spelling; an unknown one is a SpellingError that names the nearest known.

        >>> Format.parse("e2m1/1x16*e4m3/tensor").scale.block
        'tensor'
        """
        if not isinstance(spelling, str):
            raise SpellingError(f"a format is a string such as 'int4/1x128*bf16', got {spelling!r}.")
        return _parse(spelling)

    def __str__(self) -> str:
        if self.is_identity:
            return self.element.name
        scale = "" if self.scale == "fp32" else f"*{self._scale_spelling()}"
        zero_point = f"+{self.zero_point}" if self.zero_point else ""
        rule = f"~{self.rule}" if self.rule != self._default_rule() else ""
        return f"{self.element.name}/{self.block}{scale}{zero_point}{rule}"

    def _scale_spelling(self) -> str:
        return self.scale if isinstance(self.scale, str) else f"{self.scale.element.name}/{self.scale.block}"

    def _default_rule(self) -> str:
        if self.scale == "e8m0":
            return "rceil"
        if self.element.bits == 1:
            return "mse"  # one bit cannot span the whole range: it would be mostly wrong
        if self.element.name == "ternary":
            return "absmean"
        return "asymmetric" if self.zero_point else "absmax"

    def with_rule(self, rule: str) -> Format:
        """The same format with another rule for its scale; a rule that does not apply is a SpellingError."""
        base = str(self).split("~")[0]
        return Format.parse(f"{base}~{rule}")

    @property
    def is_identity(self) -> bool:
        """True for bf16, fp16 and fp32: nothing is coded and there is no scale."""
        return self.element.kind == "identity"

    @property
    def nested(self) -> Format | None:
        """The format of the scale, where the scale is itself quantized in blocks."""
        return None if isinstance(self.scale, str) else self.scale

    # -- geometry -----------------------------------------------------------------------------------------------------

    def block_dims(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(bn, bk): the rows and columns of one block of a tensor of `shape`; (n,) counts as one row.

        Raises:
            MisfitError: the blocks do not divide the shape.
        """
        if not shape:
            raise MisfitError(f"{self} wants a tensor of at least one axis, got a scalar.")
        rows, columns = (1, shape[-1]) if len(shape) == 1 else (shape[-2], shape[-1])
        if self.block == "tensor":
            return rows, columns
        if self.block == "row":
            return 1, columns
        bn, bk = (int(size) for size in self.block.split("x"))
        if self.wraps and bn == 1:
            return _wrapped(rows, columns, bk)
        if len(shape) == 1 and bn != 1:
            raise MisfitError(
                f"{self} wants a matrix, got shape {tuple(shape)}: use a block of one row, such as 1x{bk}."
            )
        if rows % bn or columns % bk:
            raise MisfitError(
                f"{self} wants a shape whose last two axes are multiples of {bn} x {bk}, got {tuple(shape)}: "
                f"{_advice(bn, bk, rows, columns)}"
            )
        return bn, bk

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `scale` for a tensor of `shape`: same rank, counted in blocks."""
        bn, bk = self.block_dims(shape)
        columns = (shape[-1] // bk if bk else 1,)
        return columns if len(shape) == 1 else (*shape[:-2], shape[-2] // bn if bn else 1, *columns)

    def bits(self, shape: tuple[int, ...]) -> float:
        """Bits for each element of a tensor of `shape`, scales and zero points included."""
        if self.is_identity:
            return float(self.element.bits)
        blocks = math.prod(self.scale_shape(shape))
        numel = max(math.prod(shape), 1)
        scale_bits = self.nested.bits(self.scale_shape(shape)) if self.nested else ELEMENTS[str(self.scale)].bits
        zero_point_bits = ELEMENTS_BITS[self.zero_point] if self.zero_point else 0
        return self.element.bits + (scale_bits + zero_point_bits) * blocks / numel

    # -- quality ------------------------------------------------------------------------------------------------------

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far a kernel's result may be from the reference, ||y - reference|| / ||reference||, for results in `dtype`.

        It covers the rounding of the result and of operands to `dtype`, twice its unit roundoff, sums in another order, and
        a zero point that a kernel keeps in bfloat16 as a product with the scale.
        """
        roundoff = torch.finfo(dtype).eps
        kept_in_bf16 = torch.finfo(torch.bfloat16).eps / 4 if self.zero_point else 0.0
        return max(2 * roundoff, 1e-5) + kept_in_bf16

    @property
    def source(self) -> str:
        """Where the format comes from."""
        return next(
            (known.source for known in KNOWN if known.spelling.split("@")[0] == str(self) and known.source),
            self.element.source,
        )


def _wrapped(rows: int, columns: int, at_most: int) -> tuple[int, int]:
    """The largest block of whole rows, or of a part of one, that holds at most so many and divides the shape."""
    if columns >= at_most:
        return 1, max(size for size in range(1, at_most + 1) if columns % size == 0)
    return max(count for count in range(1, at_most // max(columns, 1) + 1) if rows % count == 0), columns


def _advice(bn: int, bk: int, rows: int, columns: int) -> str:
    fitting = [size for size in (256, 128, 64, 32, 16) if size < bk and columns % size == 0]
    if rows % bn == 0 and fitting:
        return f"blocks of {bn}x{fitting[0]} fit, or use 'row', or leave this layer out."
    return "use 'row', or leave this layer out."


@functools.lru_cache(maxsize=4096)
def _parse(spelling: str) -> Format:
    match = _SPELLING.fullmatch(spelling.strip())
    if match is None:
        raise _unreadable(spelling)
    if match["element"] not in ELEMENTS:
        raise SpellingError.of(f"element in format {spelling!r}:", match["element"], ELEMENTS)
    element = ELEMENTS[match["element"]]
    if element.kind == "identity":
        if match["block"] or match["scale"] or match["zero_point"] or match["rule"]:
            raise SpellingError(
                f"{spelling!r}: {element.name} is kept as it is and takes no block, scale or rule: "
                f"write {element.name!r}."
            )
        return Format(element=element, block="", scale="fp32", rule="absmax")
    if not match["block"]:
        raise SpellingError(
            f"{spelling!r} lacks its block: how many elements share a scale? Write {element.name}/row or {element.name}/1x128."
        )
    if element.name == "e8m0":
        raise SpellingError(f"{spelling!r}: e8m0 holds no zero and no sign, it is for scales: write e4m3/1x32*e8m0.")
    block = match["block"]
    if block not in ("tensor", "row"):
        bn, bk = (int(size) for size in block.split("x"))
        if bn == 0 or bk == 0:
            raise SpellingError(f"{spelling!r}: a block of {block} holds nothing: write {element.name}/1x128.")
        block = f"{bn}x{bk}"
    scale = _parse_scale(match["scale"] or "fp32", spelling)
    if match["zero_point"] and match["zero_point"] not in ZERO_POINTS:
        raise SpellingError.of(f"zero point in format {spelling!r}:", match["zero_point"], ZERO_POINTS)
    if match["zero_point"] and element.kind != "int":
        raise SpellingError(
            f"{spelling!r}: only integers take a zero point, {element.name} is a {element.kind}: drop '+{match['zero_point']}'."
        )
    if match["zero_point"] and scale == "e8m0":
        raise SpellingError(f"{spelling!r}: a power-of-two scale takes no zero point: drop '+{match['zero_point']}'.")
    low, high = _ZERO_POINT_RANGES.get(match["zero_point"], (-math.inf, math.inf))
    if element.kind == "int" and not low <= element.qmin <= element.qmax <= high:
        raise SpellingError(
            f"{spelling!r}: a zero point of {element.name} lies in {element.qmin}..{element.qmax}, which "
            f"{match['zero_point']} does not hold: write +{'int8' if element.signed else 'uint8'}."
        )
    plain = Format(element=element, block=block, scale=scale, zero_point=match["zero_point"])
    rule = match["rule"] or plain._default_rule()
    allowed = rules_for(plain)
    if rule not in allowed:
        raise SpellingError.of(f"rule for {str(plain).split('~')[0]!r}:", rule, allowed)
    return dataclasses.replace(plain, rule=rule)


def rules_for(fmt: Format) -> tuple[str, ...]:
    """The names of the rules that can choose a scale for this format."""
    if fmt.scale == "e8m0":
        return (*E8M0_RULES, "mse")
    return _RULES_FOR_ZERO_POINT if fmt.zero_point else _RULES_SYMMETRIC


def _parse_scale(scale: str, spelling: str) -> str | Format:
    if scale in SCALE_DTYPES:
        return scale
    if "/" not in scale:
        raise SpellingError.of(f"scale in format {spelling!r}:", scale, (*SCALE_DTYPES, "int8/1x256", "e4m3/tensor"))
    nested = _parse(scale)
    # A scale is positive: signed integers would waste half their codes, so its mean is taken off first (QLoRA, section 3).
    if nested.element.kind == "int" and nested.element.signed:
        return Format(element=nested.element, block=nested.block, zero_point="fp32", rule="centered", wraps=True)
    return dataclasses.replace(nested, wraps=True)


def _unreadable(spelling: str) -> SpellingError:
    near = SpellingError.of("format", spelling, [known.spelling for known in KNOWN if "@" not in known.spelling])
    return SpellingError(
        f"cannot read {near}. A format is element/block[*scale][+zero_point], such as int4/1x128*bf16."
    )


ELEMENTS_BITS = {name: (32 if name == "int32" else ELEMENTS[name].bits) for name in ZERO_POINTS}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A weight format and, where the activation is quantized too, the activation's format.

    >>> str(Scheme.parse("e4m3/row@e4m3/row").act)
    'e4m3/row'
    """

    weight: Format
    act: Format | None = None

    @staticmethod
    def parse(spelling: str) -> Scheme:
        """Read a scheme, or the name of a preset in any case ("INT4", "fp8-dynamic").

        >>> str(Scheme.parse("int4"))
        'int4/1x128*bf16'
        """
        if not isinstance(spelling, str):
            raise SpellingError(f"a scheme is a string such as 'int4/1x128*bf16', got {spelling!r}.")
        return _parse_scheme(spelling)

    def __str__(self) -> str:
        return str(self.weight) + (f"@{self.act}" if self.act else "")


@functools.lru_cache(maxsize=4096)
def _parse_scheme(spelling: str) -> Scheme:
    preset = PRESETS.get(spelling.strip().upper().replace("-", "_"))
    weight, separator, act = (preset or spelling).partition("@")
    if "/" not in weight and weight.strip() not in ELEMENTS:
        raise SpellingError.of(
            "scheme", spelling, [*(name.lower() for name in PRESETS), *(known.spelling for known in KNOWN)]
        )
    if separator and not act:
        raise SpellingError(
            f"{spelling!r} ends in '@': write the activation's format after it, such as {weight}@int8/row, or drop the '@'."
        )
    return Scheme(weight=Format.parse(weight), act=Format.parse(act) if act else None)


def known_formats() -> tuple[Known, ...]:
    """All known spellings, in the order of their families."""
    return KNOWN
