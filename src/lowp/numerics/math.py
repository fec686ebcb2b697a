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

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MisfitError
from .element import Element
from .format import E8M0_RULES, Format
from .formats import ELEMENTS
from .parts import Parts

_TINY = torch.finfo(torch.float32).tiny  # 2**-126, the smallest normal float32: no scale is below it, none is zero
_HALF_MAX = torch.finfo(torch.float16).max  # 65504
_SHRINK = tuple(1.0 - 0.0125 * i for i in range(49))  # the mse rule tries ranges from 100 % down to 40 %
ZERO_POINT_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int32": torch.int32} | {
    name: ELEMENTS[name].native for name in ("bf16", "fp16", "fp32")
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
class _Stored:
    """A scale as stored, and what it reads back as (float32, one value a block)."""

    scale: Tensor
    value: Tensor
    scale_scale: Tensor | None = None
    scale_zero_point: Tensor | None = None


def _store(scale: Tensor, fmt: Format, scale_scale: Tensor | None = None) -> _Stored:
    """Round float32 scales to their storage; `scale_scale` is given where the first level's range sets it (NVFP4)."""
    nested = fmt.nested
    if nested is not None:
        return _store_nested(scale, nested, scale_scale)
    element = ELEMENTS[str(fmt.scale)]
    if element.kind == "float" and element.name != "e8m0":
        scale = scale.clamp(element.tiny, element.max)
    elif element.name == "fp16":
        scale = scale.clamp(2.0**-24, _HALF_MAX)  # smallest subnormal half, largest half
    stored = element.encode(scale)
    return _Stored(scale=stored, value=element.decode(stored))


def _store_nested(scale: Tensor, nested: Format, scale_scale: Tensor | None) -> _Stored:
    if scale_scale is not None:
        blocks = to_blocks(scale, nested.block_dims(scale.shape))
        by = _spread(scale_scale, nested, scale.shape)
        codes = nested.element.encode((blocks / by).clamp(nested.element.tiny, nested.element.max)).reshape(scale.shape)
        parts = Parts(qdata=codes, scale=scale_scale)
    else:
        parts = quantize(scale, nested)
    value = dequantize(parts, nested)
    if nested.zero_point:  # centered: the smallest scales may come back as zero or less
        value = value.clamp(min=_TINY)
    return _Stored(scale=parts.qdata, value=value, scale_scale=parts.scale, scale_zero_point=parts.zero_point)


def read_scale(parts: Parts, fmt: Format) -> Tensor:
    """The float32 scale of each block, shape `fmt.scale_shape(shape)`."""
    if parts.scale is None:
        raise MisfitError(f"{fmt} has no scale")
    nested = fmt.nested
    if nested is None:
        return ELEMENTS[str(fmt.scale)].decode(parts.scale)
    value = dequantize(Parts(qdata=parts.scale, scale=parts.scale_scale, zero_point=parts.scale_zero_point), nested)
    return value.clamp(min=_TINY) if nested.zero_point else value


# -- rules ------------------------------------------------------------------------------------------------------------

Choice = tuple[Tensor, Tensor | None]  # scale and, for an asymmetric format, the smallest value of each block


def _absmax(blocks: Tensor, fmt: Format) -> Choice:
    return _amax(blocks) / _largest(fmt.element), None


def _absmean(blocks: Tensor, fmt: Format) -> Choice:
    return blocks.abs().mean(dim=(-3, -1)), None


def _largest(element: Element) -> float:
    return max(element.max, -element.min) if element.max <= 0 else element.max  # int1 holds only {-1, 0}


def _symmetric(blocks: Tensor, fmt: Format) -> Choice:
    return _amax(blocks) / ((fmt.element.max - fmt.element.min) / 2), None


def _noclip(blocks: Tensor, fmt: Format) -> Choice:
    low = blocks.amin(dim=(-3, -1)).clamp(max=0)
    high = blocks.amax(dim=(-3, -1)).clamp(min=0)
    scale = low / fmt.element.min if fmt.element.min < 0 else torch.zeros_like(low)
    return (torch.maximum(scale, high / fmt.element.max) if fmt.element.max > 0 else scale), None


def _asymmetric(blocks: Tensor, fmt: Format) -> Choice:
    low = blocks.amin(dim=(-3, -1)).clamp(max=0)
    high = blocks.amax(dim=(-3, -1)).clamp(min=0)
    steps = fmt.element.qmax - fmt.element.qmin
    # The difference of two huge values may overflow: divide first.
    scale = torch.where((high - low).isinf(), high / steps - low / steps, (high - low) / steps)
    return scale, low


def _centered(blocks: Tensor, fmt: Format) -> Choice:
    mean = blocks.mean()
    return _amax(blocks - mean) / fmt.element.max, mean.expand(blocks.shape[:-3] + blocks.shape[-2:-1])


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
        torch.float8_e8m0fnu, same shape: 2**(code - 127); NaN where amax is NaN, and for "rceil" where it is infinite.

    Source: OCP MX v1.0 section 6.3; arXiv 2506.08027 (rceil). Worked on the bits of float32: sign 1, exponent 8, mantissa 23.
    """
    if rule == "rceil":
        amax = amax * (1.0 / element.max)
    bits = amax.contiguous().view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if rule == "rceil":
        # A subnormal m * 2**-149 lies above the code 0, 2**-127, only if m > 2**22.
        up = torch.where(exponent == 0, mantissa > 0x400000, mantissa > 0)
        code = torch.where(exponent == 0xFF, 0xFF, exponent + up.to(torch.int32))
    else:
        if rule == "ceil":
            exponent = exponent + (mantissa > 0).to(torch.int32)
        elif rule == "even":
            mantissa_bits = element.mbits if element.kind == "float" else element.bits - 2  # an integer's leading bit is implied
            exponent = ((bits + (1 << (23 - mantissa_bits - 1))) >> 23) & 0xFF
        code = torch.where(amax.isnan(), 0xFF, (exponent - element.emax).clamp(0, 0xFE))
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


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """What encoding needs, shaped to broadcast against the blocks."""

    stored: _Stored
    zero_point: Tensor | None
    element: Element
    by: Tensor
    offset: Tensor | None
    integer_offset: bool
    reciprocal: bool

    def encode(self, blocks: Tensor, noise: Tensor | None = None) -> Tensor:
        scaled = blocks * self.by.reciprocal() if self.reciprocal else blocks / self.by
        if self.offset is not None:
            scaled = (scaled.round() if self.integer_offset and noise is None else scaled) + self.offset
        return self.element.encode(scaled) if noise is None else self.element.encode_stochastic(scaled, noise)

    def decode(self, qdata: Tensor) -> Tensor:
        value = self.element.decode(qdata)
        return (value - self.offset if self.offset is not None else value) * self.by


def quantize(x: Tensor, fmt: Format, *, stochastic: bool = False, generator: torch.Generator | None = None) -> Parts:
    """Quantize a tensor.

    Args:
        x: (..., N, K) or (K,), any float dtype.
        fmt: the format; its blocks must divide the shape.
        stochastic: round up or down at random, unbiased (for gradients and low-precision master weights).
        generator: the source of randomness.

    Returns:
        Parts, with shapes as on the page of `parts.py`. NaN stays visible: a NaN makes its block's scale NaN where the scale
        is a float, and infinities likewise; an all-zero block gives zeros.

    Raises:
        MisfitError: blocks that do not divide the shape.

    >>> quantize(torch.tensor([[1.0, -7.0]]), Format.parse("int4/row")).qdata
    tensor([[ 1, -7]], dtype=torch.int8)
    """
    if fmt.is_identity:
        return Parts(qdata=x.to(fmt.element.native))
    block = fmt.block_dims(tuple(x.shape))
    if x.numel() == 0:
        return _empty(x, fmt)
    blocks = to_blocks(x.to(torch.float32), block)
    grid = _mse_grid(blocks, fmt, x.shape) if fmt.rule == "mse" else _grid(blocks, fmt, x.shape)
    noise = torch.rand(blocks.shape, device=x.device, generator=generator) if stochastic else None
    return Parts(
        qdata=grid.encode(blocks, noise).reshape(x.shape),
        scale=grid.stored.scale,
        zero_point=grid.zero_point,
        scale_scale=grid.stored.scale_scale,
        scale_zero_point=grid.stored.scale_zero_point,
    )


def quantize_given(x: Tensor, fmt: Format, scale: Tensor, zero_point: Tensor | None = None) -> Parts:
    """Quantize with a scale (and zero point) that somebody else chose: static activations, HQQ, GPTQ, learned ranges.

    Args:
        x: (..., N, K), float. scale, zero_point: `fmt.scale_shape(x.shape)`, float32, in the units of the equation above.

    Returns:
        Parts whose scale and zero point are rounded to their storage dtypes.
    """
    blocks = to_blocks(x.to(torch.float32), fmt.block_dims(tuple(x.shape)))
    scale = scale.to(torch.float32).reshape(fmt.scale_shape(tuple(x.shape)))
    stored = _store(scale.clamp(min=_TINY), fmt)
    given = None if zero_point is None else _store_zero_point(zero_point.to(torch.float32).reshape(scale.shape), fmt)
    grid = _assemble(stored, given, fmt, x.shape)
    return Parts(
        qdata=grid.encode(blocks).reshape(x.shape),
        scale=stored.scale,
        zero_point=given,
        scale_scale=stored.scale_scale,
        scale_zero_point=stored.scale_zero_point,
    )


def _grid(blocks: Tensor, fmt: Format, shape: torch.Size, shrink: float = 1.0) -> _Grid:
    """Scale and zero point by the format's rule, of a range shrunk by a factor (1: the whole range)."""
    ranged = blocks if shrink == 1.0 else blocks * shrink
    choose = RULES[fmt.rule].choose if fmt.rule != "mse" else _mse_base(fmt).choose
    scale, low = choose(ranged, fmt)
    scale = scale.reshape(fmt.scale_shape(tuple(shape)))
    stored = _store(scale.clamp(min=_TINY), fmt, _outer_scale(blocks, fmt, scale))
    return _assemble(stored, None if low is None else _zero_point(low.reshape(scale.shape), stored.value, fmt), fmt, shape)


def _assemble(stored: _Stored, zero_point: Tensor | None, fmt: Format, shape: torch.Size) -> _Grid:
    return _Grid(
        stored=stored,
        zero_point=zero_point,
        element=fmt.element,
        by=_spread(stored.value, fmt, shape),
        offset=None if zero_point is None else _spread(zero_point.to(torch.float32), fmt, shape),
        integer_offset=fmt.zero_point in ("int8", "uint8", "int32"),
        reciprocal=fmt.rule in RULES and RULES[fmt.rule].reciprocal or fmt.scale in ("e4m3", "e8m0") or fmt.nested is not None,
    )


def _outer_scale(blocks: Tensor, fmt: Format, scale: Tensor) -> Tensor | None:
    """NVFP4's second level, amax / (448 * 6), taken from the data itself so that it is rounded once."""
    nested = fmt.nested
    if nested is None or nested.element.kind != "float":
        return None
    amax = _amax(to_blocks(_amax(blocks).reshape(scale.shape), nested.block_dims(tuple(scale.shape))))
    outer = amax.reshape(nested.scale_shape(tuple(scale.shape))) / (nested.element.max * _largest(fmt.element))
    return torch.where(outer == 0, torch.ones_like(outer), outer.clamp(min=_TINY))


def _zero_point(low: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    if fmt.rule == "centered":
        return -low / scale
    zero_point = fmt.element.qmin - (low / scale).round() if _is_integer(fmt) else fmt.element.qmin - low / scale
    return _store_zero_point(zero_point.clamp(fmt.element.qmin, fmt.element.qmax), fmt)


def _is_integer(fmt: Format) -> bool:
    return fmt.zero_point in ("int8", "uint8", "int32")


def _store_zero_point(zero_point: Tensor, fmt: Format) -> Tensor:
    return (zero_point.round() if _is_integer(fmt) else zero_point).to(ZERO_POINT_DTYPES[str(fmt.zero_point)])


def _mse_base(fmt: Format) -> Rule:
    return RULES["rceil" if fmt.scale == "e8m0" else "asymmetric" if fmt.zero_point else "absmax"]


def _mse_grid(blocks: Tensor, fmt: Format, shape: torch.Size) -> _Grid:
    """For each block the range with the least squared error, among `_SHRINK` of the whole range."""
    shrinks = (1.0, 0.5) if fmt.scale == "e8m0" else _SHRINK
    best_error, best_shrink = None, None
    for shrink in shrinks:
        grid = _grid(blocks, fmt, shape, shrink)
        error = (grid.decode(grid.encode(blocks)) - blocks).square().sum(dim=(-3, -1), keepdim=True)
        if best_error is None or best_shrink is None:
            best_error, best_shrink = error, torch.full_like(error, shrink)
        else:
            best_shrink = torch.where(error < best_error, shrink, best_shrink)
            best_error = torch.minimum(error, best_error)
    assert best_shrink is not None
    scale, low = _mse_base(fmt).choose(blocks * best_shrink, fmt)
    scale = scale.reshape(fmt.scale_shape(tuple(shape)))
    stored = _store(scale.clamp(min=_TINY), fmt, _outer_scale(blocks, fmt, scale))
    return _assemble(stored, None if low is None else _zero_point(low.reshape(scale.shape), stored.value, fmt), fmt, shape)


def _empty(x: Tensor, fmt: Format) -> Parts:
    scale = torch.ones(fmt.scale_shape(tuple(x.shape)), device=x.device)
    stored = _store(scale, fmt) if scale.numel() else _Stored(scale=scale, value=scale)
    zero_point = torch.zeros_like(scale).to(ZERO_POINT_DTYPES[fmt.zero_point]) if fmt.zero_point else None
    return Parts(
        qdata=torch.empty(x.shape, dtype=fmt.element.dtype, device=x.device),
        scale=stored.scale,
        zero_point=zero_point,
        scale_scale=stored.scale_scale,
        scale_zero_point=stored.scale_zero_point,
    )


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
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    shape = parts.qdata.shape
    blocks = to_blocks(fmt.element.decode(parts.qdata, compute), _block_dims_of(parts, fmt))
    if parts.zero_point is not None:
        blocks = blocks - _spread(parts.zero_point.to(compute), fmt, shape)
    values = (blocks * _spread(read_scale(parts, fmt).to(compute), fmt, shape)).reshape(shape)
    if dtype == torch.float16:
        finite = values.clamp(-_HALF_MAX, _HALF_MAX)
        values = torch.where(values.isinf(), values, finite)
    return values.to(dtype)


def _block_dims_of(parts: Parts, fmt: Format) -> tuple[int, int]:
    return fmt.block_dims(tuple(parts.qdata.shape)) if math.prod(parts.qdata.shape) else (1, 1)


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """Quantize and dequantize, in x's dtype: what quantization does to the numbers.

    >>> fake_quantize(torch.tensor([[1.4, -7.0]]), Format.parse("int4/row"))
    tensor([[ 1., -7.]])
    """
    return dequantize(quantize(x, fmt), fmt, x.dtype)
