"""Block math: choose a scale for each block, encode, decode.

    value = (qdata - zero_point) * scale                    decoding, for every format
    qdata = nearest(x / scale + zero_point)                 encoding, with the scale *as it is stored*

A tensor (..., N, K) is seen as blocks (..., N/bn, bn, K/bk, bk); a rule turns each block into a scale (and a zero point). The
scale is rounded to its storage dtype before the elements are encoded, so that its rounding costs nothing twice. All math is
in float32, whatever the dtype that comes in.

Rules, with qmin and qmax the element's smallest and largest value and amax the block's largest magnitude:

    absmax       scale = amax / qmax                                        nothing is clamped
    symmetric    scale = amax / ((qmax - qmin) / 2)                         torchao's: the positive extreme may clip
    noclip       scale = max(min / qmin, max / qmax)                        uses the extra negative code where it helps
    asymmetric   scale = (max - min) / (qmax - qmin), zero_point = qmin - min / scale        range widened to hold 0
    absmean      scale = mean(|x|)                                          ternary weights (BitNet b1.58)
    mse          the best of a family of shrunk ranges, by squared error
    floor, ceil, even, rceil     powers of two, see `formats/mx.py`
    centered     absmax of the deviation from the mean: for scales (QLoRA)

`quantize_given` takes the scale and zero point from the caller.

Sources: Jacob et al., arXiv 1712.05877 section 2; OCP MX v1.0 section 6.3; NVFP4, arXiv 2509.25149;
QLoRA, arXiv 2305.14314; BitNet b1.58, arXiv 2402.17764.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MisfitError
from .element import Element
from .format import E8M0_RULES, Format
from .formats import ELEMENTS
from .grid import Grid, grid_of, has_integer_zero_point
from .parts import Parts

_TINY = torch.finfo(torch.float32).tiny  # 2**-126, the smallest normal float32: no scale is below it, none is zero
_HALF_MAX = torch.finfo(torch.float16).max  # 65504
_PIECE = 1 << 17  # numbers that are worked on at a time on a CPU: 512 KB of float32, what a core's cache holds
_LARGE_PIECE = 1 << 25  # elsewhere: 128 MB, enough that launches cost nothing beside the work
_SHRINK = tuple(
    1.0 - 0.0125 * i for i in range(49)
)  # the mse rule tries ranges from 100 % down to 40 %; weighed: half of them
ZERO_POINT_DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

_SCALE_RANGES = {  # the smallest and largest scale stored; for other elements their smallest normal and largest value
    "e8m0": (2.0**-127, 2.0**127),
    "bf16": (_TINY, torch.finfo(torch.bfloat16).max),
    "fp16": (2.0**-24, _HALF_MAX),  # the smallest subnormal
    "fp32": (_TINY, torch.finfo(torch.float32).max),
}

# -- blocks -----------------------------------------------------------------------------------------------------------


def to_blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """View (..., N, K) as (..., N/bn, bn, K/bk, bk); a vector (K,) counts as one row."""
    bn, bk = block
    matrix = x.unsqueeze(0) if x.dim() == 1 else x
    rows, columns = matrix.shape[-2:]
    return matrix.reshape(*matrix.shape[:-2], rows // bn, bn, columns // bk, bk)


def _amax(blocks: Tensor) -> Tensor:
    return blocks.abs().amax(dim=(-3, -1))


def _spread(per_block: Tensor, fmt: Format, shape: torch.Size) -> Tensor:
    """A value for each block, shaped to broadcast against `to_blocks`: (..., N/bn, 1, K/bk, 1)."""
    matrix = per_block.unsqueeze(0) if len(shape) == 1 else per_block
    return matrix.unsqueeze(-1).unsqueeze(-3)


# -- scales as they are stored ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Second:
    """The second level of a quantized scale: as stored, and spread to one value a block of the first level."""

    scale: Tensor
    zero_point: Tensor | None
    by: Tensor
    offset: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A scale as stored, what it reads back as (float32, one value a block), and its inverse where 1 / value would differ."""

    scale: Tensor
    value: Tensor
    inverse: Tensor | None = None


def _store(scale: Tensor, fmt: Format, second: _Second | None) -> _Stored:
    """Round float32 scales to their storage, each by itself."""
    if fmt.nested is not None and second is not None:
        return _store_nested(scale.clamp(min=_TINY), fmt.nested.element, second)
    element = ELEMENTS[str(fmt.scale)]
    low, high = _SCALE_RANGES.get(element.name) or (element.tiny, element.max)
    infinity = math.inf if element.kind == "identity" else math.nan  # an infinite scale stays visible
    stored = element.encode(torch.where(scale.isinf(), infinity, scale.clamp(low, high)))
    return _Stored(scale=stored, value=element.decode(stored))


def _store_nested(scale: Tensor, element: Element, second: _Second) -> _Stored:
    scaled = scale / second.by
    if element.kind == "float":
        codes = element.encode(scaled.clamp(element.tiny, element.max))
        value = element.decode(codes)
        # torchao's order, for its last bit
        return _Stored(scale=codes, value=value * second.by, inverse=second.by.reciprocal() / value)
    codes = element.encode(scaled if second.offset is None else scaled + second.offset)
    value = element.decode(codes)
    value = (value if second.offset is None else value - second.offset) * second.by
    return _Stored(scale=codes, value=value.clamp(min=_TINY))


def _second_level(scale: Tensor, fmt: Format, amax: Tensor | None, outer: Tensor | None = None) -> _Second | None:
    """The scale (and zero point) of the scales, by the whole range of them; `amax` of the data's blocks where it is at hand.

    outer: the scale of float scales, where somebody else chose it.
    """
    nested = fmt.nested
    if nested is None:
        return None
    blocks = to_blocks(scale, nested.block_dims(tuple(scale.shape)))
    zero_point = None
    if outer is not None:
        if nested.element.kind != "float":
            raise MisfitError(f"{fmt}: only a float scale takes a scale of its own from elsewhere.")
        outer = (
            outer.to(torch.float32)
            .expand(nested.scale_shape(tuple(scale.shape)))
            .clamp(min=_TINY / nested.element.tiny)
        )
    elif nested.element.kind == "float":
        # NVFP4's amax / (448 * 6), from the data itself so that it is rounded once
        top, largest = (scale, 1.0) if amax is None else (amax, fmt.element.largest)
        tops = to_blocks(top.reshape(scale.shape), nested.block_dims(tuple(scale.shape)))
        outer = _divide(_amax(tops), nested.element.max * largest)
        # No block's scale, at least element.tiny of it, may be subnormal: its reciprocal would be infinite.
        outer = torch.where(outer == 0, 1.0, outer.clamp(min=_TINY / nested.element.tiny))
    else:
        outer, low = _base(nested).choose(blocks, nested)
        outer = outer.clamp(min=_TINY)
        zero_point = None if low is None else (-low / outer).reshape(nested.scale_shape(tuple(scale.shape)))
    outer = outer.reshape(nested.scale_shape(tuple(scale.shape)))

    def spread(values: Tensor) -> Tensor:
        return _spread(values, nested, scale.shape).expand(blocks.shape).reshape(scale.shape)

    return _Second(
        scale=outer,
        zero_point=zero_point,
        by=spread(outer),
        offset=None if zero_point is None else spread(zero_point),
    )


def read_scale(parts: Parts, fmt: Format) -> Tensor:
    """The float32 scale of each block, shape `fmt.scale_shape(shape)`."""
    if parts.scale is None:
        raise MisfitError(f"{fmt} has no scale")
    nested = fmt.nested
    if nested is None:
        return ELEMENTS[str(fmt.scale)].decode(parts.scale)
    value = dequantize(Parts(qdata=parts.scale, scale=parts.scale_scale, zero_point=parts.scale_zero_point), nested)
    return value.clamp(min=_TINY)  # the smallest scales may come back as zero or less


# -- rules ------------------------------------------------------------------------------------------------------------

Choice = tuple[Tensor, Tensor | None]  # scale and, for an asymmetric format, the smallest value of each block


def _divide(x: Tensor, by: float) -> Tensor:
    """x / by, the same on every device: by a plain number a GPU multiplies by its reciprocal, off by the last bit."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def _absmax(blocks: Tensor, fmt: Format) -> Choice:
    return _divide(_amax(blocks), fmt.element.largest), None


def _absmean(blocks: Tensor, fmt: Format) -> Choice:
    count = blocks.shape[-3] * blocks.shape[-1]
    return _divide(blocks.abs(), count).sum(dim=(-3, -1)), None  # divided first: the sum of huge numbers may overflow


def _symmetric(blocks: Tensor, fmt: Format) -> Choice:
    return _divide(_amax(blocks), (fmt.element.max - fmt.element.min) / 2), None


def _noclip(blocks: Tensor, fmt: Format) -> Choice:
    low = blocks.amin(dim=(-3, -1)).clamp(max=0)
    high = blocks.amax(dim=(-3, -1)).clamp(min=0)
    # An unsigned element holds no negative number, but an infinite one must not vanish.
    scale = _divide(low, fmt.element.min) if fmt.element.min < 0 else torch.where(low.isinf(), -low, 0.0)
    return (torch.maximum(scale, _divide(high, fmt.element.max)) if fmt.element.max > 0 else scale), None


def _asymmetric(blocks: Tensor, fmt: Format) -> Choice:
    low = blocks.amin(dim=(-3, -1)).clamp(max=0)
    high = blocks.amax(dim=(-3, -1)).clamp(min=0)
    steps = fmt.element.qmax - fmt.element.qmin
    # The difference of two huge values may overflow: divide first.
    apart = _divide(high, steps) - _divide(low, steps)
    scale = torch.where((high - low).isinf(), apart, _divide(high - low, steps))
    return scale, low


def _centered(blocks: Tensor, fmt: Format) -> Choice:
    mean = _divide(blocks, blocks.numel()).sum()
    return _divide(_amax(blocks - mean), fmt.element.max), mean.expand(blocks.shape[:-3] + blocks.shape[-2:-1])


def _power_of_two(rule: str) -> Callable[[Tensor, Format], Choice]:
    def choose(blocks: Tensor, fmt: Format) -> Choice:
        return ELEMENTS["e8m0"].decode(e8m0_scale(_amax(blocks), fmt.element, rule)), None

    return choose


def e8m0_scale(amax: Tensor, element: Element, rule: str) -> Tensor:
    """The shared power-of-two scale of MX blocks.

    Args:
        amax: largest magnitude of each block, float32, any shape.
        element: the element of the block. rule: "floor", "ceil", "even" or "rceil".

    Returns:
        torch.float8_e8m0fnu, same shape: 2**(code - 127); NaN where amax is NaN. An infinite amax gives a finite scale so large
        that the element's largest value times it is infinite again, as torchao has it; for integers it gives NaN.

    Source: OCP MX v1.0 section 6.3; arXiv 2506.08027 (rceil). Worked on the bits of float32: sign 1, exponent 8, mantissa 23,
    so that no rounding of a logarithm or a quotient comes in.
    """
    bits = amax.contiguous().view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if rule == "even":
        mantissa_bits = (
            element.mbits if element.kind == "float" else element.bits - 2
        )  # an integer's leading bit is implied
        exponent = ((bits + (1 << (23 - mantissa_bits - 1))) >> 23) & 0xFF
    elif rule != "floor":
        # rceil: amax / largest lies above a power of two if its mantissa is above that of largest.
        above = 0 if rule == "ceil" else int((element.largest / 2.0**element.emax - 1.0) * 2**23)
        exponent = exponent + (mantissa > above).to(torch.int32)
    code = (exponent - element.emax).clamp(0, 0xFE)
    if rule == "rceil":
        code = torch.where(amax.isinf(), 0xFE, code)
    code = torch.where(amax.isnan() if element.kind == "float" else ~amax.isfinite(), 0xFF, code)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a scale is chosen.

    Args:
        name: its spelling after "~".
        choose: blocks (..., N/bn, bn, K/bk, bk) and the format -> scale and, where it has a zero point, the blocks' minimum.
        reciprocal: encode x * (1 / scale) instead of x / scale; the two differ in the last bit, and torchao's bytes need it.
        about: one line.
    """

    name: str
    choose: Callable[[Tensor, Format], Choice]
    reciprocal: bool = False
    about: str = ""


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(name="absmax", choose=_absmax, about="amax / qmax: nothing is clamped"),
        Rule(name="absmean", choose=_absmean, about="mean magnitude, for ternary weights (BitNet b1.58)"),
        Rule(name="symmetric", choose=_symmetric, reciprocal=True, about="amax / ((qmax - qmin) / 2), as torchao"),
        Rule(name="noclip", choose=_noclip, reciprocal=True, about="max(min / qmin, max / qmax), as torchao"),
        Rule(name="asymmetric", choose=_asymmetric, reciprocal=True, about="(max - min) / (qmax - qmin), as torchao"),
        Rule(name="centered", choose=_centered, about="of the deviation from the mean, for scales (QLoRA)"),
        *(Rule(name=name, choose=_power_of_two(name), about=f"power of two, MX {name}") for name in E8M0_RULES),
        Rule(name="mse", choose=_absmax, about="the range of least squared error"),
    )
}


# -- quantize and dequantize ------------------------------------------------------------------------------------------


def _piece(blocks: Tensor) -> int:
    return _PIECE if blocks.device.type == "cpu" else _LARGE_PIECE


def _row_pieces(blocks: Tensor) -> Iterator[slice]:
    """Slices of the first axis of (rows, bn, columns, bk) that hold about a piece of numbers, or one row of blocks."""
    step = max(1, _piece(blocks) // max(blocks[0].numel(), 1))
    return (slice(i, i + step) for i in range(0, blocks.shape[0], step))


def _inner_pieces(blocks: Tensor) -> Iterator[slice]:
    """Slices of the second axis, for blocks that are large themselves."""
    step = max(1, _piece(blocks) // max(blocks[0, 0].numel(), 1))
    return (slice(i, i + step) for i in range(0, blocks.shape[1], step))


def _encode(grid: Grid, blocks: Tensor, stochastic: bool, generator: torch.Generator | None) -> Tensor:
    """Encode all blocks; on a CPU in pieces that stay in its cache, which is faster and needs no second tensor of floats."""

    def encode(grid: Grid, piece: Tensor) -> Tensor:
        return grid.encode(
            piece, torch.rand(piece.shape, device=piece.device, generator=generator) if stochastic else None
        )

    if torch.compiler.is_compiling() or blocks.device.type != "cpu" or blocks.numel() <= _PIECE:
        return encode(grid, blocks)
    qdata = torch.empty(blocks.shape, dtype=grid.element.dtype)
    for rows in _row_pieces(blocks):
        part = grid.rows(rows)
        for inside in _inner_pieces(blocks):
            qdata[rows, inside] = encode(part, blocks[rows, inside])
    return qdata


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    outer: Tensor | None = None,
    importance: Tensor | None = None,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Parts:
    """Quantize a tensor.

    Args:
        x: (..., N, K) or (K,), any float dtype.
        fmt: the format; its blocks must divide the shape.
        outer: the scale of the scales where it is chosen elsewhere (NVFP4: one for the layers that are multiplied as one).
        importance: (K,), what a squared error in each column counts: the rule `mse` weighs by it, others do not look at it.
        stochastic: round up or down at random, unbiased (for gradients and low-precision master weights).
        generator: the source of randomness.

    Returns:
        Parts, with shapes as on the page of `parts.py`, all contiguous and without gradient. NaN and infinity stay visible:
        they come back as NaN or infinity, with all of their block if need be. An all-zero block gives zeros.

    Raises:
        MisfitError: blocks that do not divide the shape.

    >>> quantize(torch.tensor([[1.0, -7.0]]), Format.parse("int4/row")).qdata
    tensor([[ 1, -7]], dtype=torch.int8)
    """
    x = x.detach()
    if fmt.is_identity:
        if not stochastic:
            return Parts(qdata=x.to(fmt.element.native))
        return Parts(
            qdata=fmt.element.encode_stochastic(x.float(), torch.rand(x.shape, device=x.device, generator=generator))
        )
    block = fmt.block_dims(tuple(x.shape))
    if x.numel() == 0:
        return _empty(x, fmt)
    blocks = to_blocks(x.to(torch.float32).contiguous(), block).flatten(0, -4)
    scale, low = _base(fmt).choose(blocks, fmt)
    shape = fmt.scale_shape(tuple(x.shape))
    second = _second_level(scale.reshape(shape), fmt, _amax(blocks) if fmt.nested else None, outer)
    if fmt.rule == "mse":
        scale, low = _mse(blocks, fmt, second, None if importance is None else importance.view(1, 1, -1, block[1]))
    stored = _store(scale.reshape(shape), fmt, second)
    zero_point = None if low is None else _zero_point(low.reshape(shape), stored.value, fmt)
    return _encoded(x, fmt, blocks, stored, second, zero_point, stochastic=stochastic, generator=generator)


def quantize_given(x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None = None) -> Parts:
    """Quantize with a scale (and zero point) that somebody else chose: static activations, HQQ, GPTQ, learned ranges.

    Args:
        x: (..., N, K), float. scale, zero_point: `fmt.scale_shape(x.shape)`, float32, in the units of the equation above.

    Returns:
        Parts whose scale and zero point are rounded to their storage dtypes, as `quantize` answers them.

    Raises:
        MisfitError: blocks that do not divide the shape, or scales of another shape.
    """
    x, shape = x.detach(), fmt.scale_shape(tuple(x.shape))
    for name, given in (("scale", scale), ("zero point", zero_point)):
        if given is not None and tuple(given.shape) != shape:
            raise MisfitError(
                f"{fmt} wants a {name} of shape {shape} for a tensor {tuple(x.shape)}, got {tuple(given.shape)}."
            )
    if x.numel() == 0:
        return _empty(x, fmt)
    blocks = to_blocks(x.to(torch.float32).contiguous(), fmt.block_dims(tuple(x.shape))).flatten(0, -4)
    scale = scale.detach().to(torch.float32)
    second = _second_level(scale, fmt, None)
    stored = _store(scale, fmt, second)
    zero_point = None if zero_point is None else _store_zero_point(zero_point.detach().to(torch.float32), fmt)
    return _encoded(x, fmt, blocks, stored, second, zero_point)


def _encoded(
    x: Tensor,
    fmt: Format,
    blocks: Tensor,
    stored: _Stored,
    second: _Second | None,
    zero_point: Tensor | None,
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Parts:
    grid = _grid(stored, zero_point, fmt, blocks)
    return Parts(
        qdata=_encode(grid, blocks, stochastic, generator).reshape(x.shape),
        scale=stored.scale,
        zero_point=zero_point,
        scale_scale=None if second is None else second.scale,
        scale_zero_point=None if second is None else second.zero_point,
    )


def _grid(stored: _Stored, zero_point: Tensor | None, fmt: Format, blocks: Tensor) -> Grid:
    counts = (blocks.shape[0], blocks.shape[2])
    return grid_of(stored.value, stored.inverse, zero_point, fmt, counts, reciprocal=RULES[fmt.rule].reciprocal)


def grid_of_parts(parts: Parts, fmt: Format) -> Grid:
    """The grid of a matrix (N, K) that was quantized already, to encode other numbers with its scales and zero points.

    Its tensors have the shape (N/bn, 1, K/bk, 1).
    """
    value, inverse = read_scale(parts, fmt), None
    if fmt.nested is not None and fmt.nested.element.kind == "float":
        ones = fmt.nested.element.encode(torch.ones_like(value))
        outer = dequantize(Parts(qdata=ones, scale=parts.scale_scale), fmt.nested)
        assert parts.scale is not None
        inverse = outer.reciprocal() / fmt.nested.element.decode(parts.scale)
    counts = (value.shape[-2], value.shape[-1])
    return grid_of(value, inverse, parts.zero_point, fmt, counts, reciprocal=RULES[fmt.rule].reciprocal)


def _zero_point(low: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    zero_point = (
        fmt.element.qmin - (low / scale).round() if has_integer_zero_point(fmt) else fmt.element.qmin - low / scale
    )
    return _store_zero_point(zero_point.clamp(fmt.element.qmin, fmt.element.qmax), fmt)


def _store_zero_point(zero_point: Tensor, fmt: Format) -> Tensor:
    dtype = ZERO_POINT_DTYPES[str(fmt.zero_point)]
    if has_integer_zero_point(fmt):
        info = torch.iinfo(dtype)
        zero_point = zero_point.round().clamp(info.min, info.max)
    return zero_point.to(dtype)


def _base(fmt: Format) -> Rule:
    """The format's rule; for mse the rule whose range is searched."""
    if fmt.rule != "mse":
        return RULES[fmt.rule]
    return RULES["rceil" if fmt.scale == "e8m0" else "asymmetric" if fmt.zero_point else "absmax"]


def _mse(blocks: Tensor, fmt: Format, second: _Second | None, importance: Tensor | None) -> Choice:
    """For each block the range with the least squared error, among `_SHRINK` of the whole range.

    The second level of a scale stays that of the whole range, so that one block does not depend on another and rows of
    blocks can be worked on in pieces.
    """
    choices = [
        _mse_of_rows(blocks[rows], fmt, _second_of(second, rows, blocks), importance) for rows in _row_pieces(blocks)
    ]
    lows = [low for _, low in choices if low is not None]
    return torch.cat([scale for scale, _ in choices]), torch.cat(lows) if lows else None


def _mse_of_rows(blocks: Tensor, fmt: Format, second: _Second | None, importance: Tensor | None) -> Choice:
    # The rules searched look at the smallest and largest value alone, so these two stand for the block.
    extremes = torch.stack((blocks.amin(dim=(-3, -1)), blocks.amax(dim=(-3, -1))), dim=-1).unsqueeze(1)
    shrinks = (1.0, 0.5) if fmt.scale == "e8m0" else _SHRINK if importance is None else _SHRINK[::2]
    errors = torch.zeros(len(shrinks), blocks.shape[0], blocks.shape[2], device=blocks.device)
    for error, shrink in zip(errors, shrinks, strict=True):
        scale, low = _base(fmt).choose(extremes * shrink, fmt)
        stored = _store(scale, fmt, second)
        grid = _grid(stored, None if low is None else _zero_point(low, stored.value, fmt), fmt, blocks)
        for inside in _inner_pieces(blocks):
            piece = blocks[:, inside]
            squares = grid.decode(grid.encode(piece)).sub_(piece).square_()
            error += (squares if importance is None else squares * importance).sum(dim=(-3, -1))
    best = torch.tensor(shrinks, device=blocks.device)[errors.argmin(dim=0)]
    return _base(fmt).choose(extremes * best[:, None, :, None], fmt)


def _second_of(second: _Second | None, rows: slice, blocks: Tensor) -> _Second | None:
    """The second level of the scales of some rows of blocks."""
    if second is None:
        return None
    shape = (blocks.shape[0], blocks.shape[2])
    offset = None if second.offset is None else second.offset.reshape(shape)[rows]
    return dataclasses.replace(second, by=second.by.reshape(shape)[rows], offset=offset)


def _empty(x: Tensor, fmt: Format) -> Parts:
    """The parts of a tensor without numbers, in the shapes and dtypes of any other."""
    ones = torch.ones(fmt.scale_shape(tuple(x.shape)), device=x.device)
    second = _second_level(ones, fmt, None) if ones.numel() else _empty_second(ones, fmt)
    return Parts(
        qdata=torch.empty(x.shape, dtype=fmt.element.dtype, device=x.device),
        scale=_store(ones, fmt, second).scale,
        zero_point=torch.zeros_like(ones).to(ZERO_POINT_DTYPES[fmt.zero_point]) if fmt.zero_point else None,
        scale_scale=None if second is None else second.scale,
        scale_zero_point=None if second is None else second.zero_point,
    )


def _empty_second(scale: Tensor, fmt: Format) -> _Second | None:
    if fmt.nested is None:
        return None
    outer = torch.ones(fmt.nested.scale_shape(tuple(scale.shape)), device=scale.device)
    zero_point = torch.zeros_like(outer) if fmt.nested.zero_point else None
    return _Second(scale=outer, zero_point=zero_point, by=scale, offset=None if zero_point is None else scale)


def dequantize(parts: Parts, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values, (qdata - zero_point) * scale.

    Args:
        parts: as `quantize` answers. fmt: the same format. dtype: of the result; the math is float32 (float64 if asked for).

    Returns:
        Same shape as qdata. A finite value never becomes infinite in float16: it is clamped to +-65504.

    >>> fmt = Format.parse("int4/row")
    >>> dequantize(quantize(torch.tensor([[1.0, -7.0]]), fmt), fmt)
    tensor([[ 1., -7.]])
    """
    if fmt.is_identity:
        return parts.qdata.to(dtype)
    if parts.qdata.numel() == 0:
        return torch.empty(parts.qdata.shape, dtype=dtype, device=parts.qdata.device)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shape = parts.qdata.shape
    blocks = to_blocks(fmt.element.decode(parts.qdata, compute), fmt.block_dims(tuple(shape)))
    if parts.zero_point is not None:
        blocks = blocks - _spread(parts.zero_point.to(compute), fmt, shape)
    values = (blocks * _spread(read_scale(parts, fmt).to(compute), fmt, shape)).reshape(shape)
    if dtype == torch.float16:
        values = torch.where(values.isinf(), values, values.clamp(-_HALF_MAX, _HALF_MAX))
    return values.to(dtype)


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Quantize and dequantize, in x's dtype: what quantization does to the numbers. No gradient passes: for that see `lowp.qat`.

    >>> fake_quantize(torch.tensor([[1.4, -7.0]]), Format.parse("int4/row"))
    tensor([[ 1., -7.]])
    """
    return dequantize(quantize(x, fmt), fmt, x.dtype)
