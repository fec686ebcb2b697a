"""torchao's affine primitives, number for number: choose a scale, quantize, dequantize, over blocks of any rank.

    quantize     q = clamp(round(x * (1 / scale)) + zero_point, qmin, qmax)         ties to even, zero point after rounding
    dequantize   x = (q - zero_point) * scale

    SYMMETRIC                   scale = max(|min|, max) / ((qmax - qmin) / 2)       the positive extreme may clip
    SYMMETRIC_NO_CLIPPING_ERR   scale = max(min / qmin, max / qmax)
    ASYMMETRIC                  scale = (max - min) / (qmax - qmin), zero_point = qmin - round(min / scale)

min and max are widened to hold 0. All is computed in the dtype that comes in (bfloat16 in bfloat16), which is where these
differ from `lowp.numerics`, whose math is float32 always; a scale is at least `eps`, by default the dtype's smallest normal.

A zero point of the domain FLOAT (tinygemm) is in units of the value: x = (q - middle) * scale + zero_point, with the middle of
the codes, 8 for four bits.

`block_size` has the tensor's rank: block i of axis i shares a scale; a 1 keeps every index apart.

Sources: Jacob et al., arXiv 1712.05877, section 2; HQQ, https://mobiusml.github.io/hqq_blog; behaviour of torchao 0.18.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError
from .words import MappingType, TorchAODType, ZeroPointDomain

Bound = int | float | None


class AssertedError(MisfitError, AssertionError):
    """A refusal where torchao asserts: code that catches its AssertionError goes on working."""


def _bounds() -> dict[object, tuple[int, int]]:
    bounds: dict[object, tuple[int, int]] = {
        torch.uint8: (0, 255),
        torch.int8: (-128, 127),
        torch.int16: (-(2**15), 2**15 - 1),
        torch.int32: (-(2**31), 2**31 - 1),
    }
    for bits in range(1, 8):
        bounds[getattr(torch, f"uint{bits}")] = (0, 2**bits - 1)
        bounds[getattr(torch, f"int{bits}")] = bounds[TorchAODType[f"INT{bits}"]] = (
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
        )
    return bounds


BOUNDS = _bounds()
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_SUB_BYTE_UNSIGNED = tuple(getattr(torch, f"uint{bits}") for bits in range(1, 8))


def quant_bounds(dtype: torch.dtype, quant_min: Bound = None, quant_max: Bound = None) -> tuple[float, float]:
    """The smallest and largest code of a dtype, narrowed to what is given.

    Raises:
        MisfitError: bounds that the dtype does not hold, a dtype that is no integer or float8.
    """
    if dtype in _FLOAT8:
        low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    elif dtype in BOUNDS:
        low, high = BOUNDS[dtype]
    else:
        raise MisfitError(f"a quantized dtype is an integer of 1 to 32 bits or a float8, got {dtype}.")
    quant_min, quant_max = low if quant_min is None else quant_min, high if quant_max is None else quant_max
    if quant_min < low or quant_max > high:
        raise MisfitError(
            f"{dtype} holds {low} to {high}, got quant_min={quant_min}, quant_max={quant_max}: narrow them."
        )
    return quant_min, quant_max


def reduction(block_size: Sequence[int], input_size: Sequence[int]) -> tuple[list[int], list[int]]:
    """The shape in which each block has axes of its own, and those axes.

    >>> reduction((1, 32), (8, 64))
    ([8, 2, 32], [2])
    """
    if len(block_size) != len(input_size):
        raise MisfitError(f"block_size wants one number for each axis of {tuple(input_size)}, got {tuple(block_size)}.")
    shape: list[int] = []
    axes: list[int] = []
    for block, length in zip(block_size, input_size, strict=True):
        if block == 1 or block == length:
            shape.append(length)
            whole = block != 1
        else:
            if length % block:
                raise MisfitError(
                    f"block_size {tuple(block_size)} wants a shape that it divides, got {tuple(input_size)}: take another."
                )
            shape += [length // block, block]
            whole = True
        if whole:
            axes.append(len(shape) - 1)
    return shape, axes


@dataclass(frozen=True)
class _Blocks:
    """A tensor seen in blocks: its values with an axis for each block, and the shape of one number for each block."""

    shape: list[int]
    axes: list[int]

    @classmethod
    def of(cls, x: Tensor, block_size: Sequence[int]) -> _Blocks:
        return cls(*reduction(block_size, x.shape))

    def spread(self, per_block: Tensor) -> Tensor:
        """One number for each block, shaped to broadcast."""
        return per_block.view([1 if axis in self.axes else length for axis, length in enumerate(self.shape)])


def _tensor(x: Tensor | float | None, like: Tensor) -> Tensor | None:
    return x if x is None or isinstance(x, Tensor) else torch.tensor(x, device=like.device)


# -- choose -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def choose_qparams_affine(
    input: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = torch.int32,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of each block.

    Args:
        input: any shape, float. block_size: of the same rank. target_dtype, quant_min, quant_max: the codes.
        eps: the smallest scale. scale_dtype: the input's if absent. keepdim: keep the axes that blocks take up.

    Returns:
        scale and zero_point, one for each block.

    >>> choose_qparams_affine(torch.tensor([[-3.5, 10.2]]), MappingType.SYMMETRIC, (1, 2), torch.int8, -8, 7)[0]
    tensor([1.3600])
    """
    low, high = _extremes(input, block_size, keepdim)
    return _from_extremes(
        low, high, mapping_type, quant_bounds(target_dtype, quant_min, quant_max), eps, scale_dtype, zero_point_dtype
    )


@torch.no_grad()
def choose_qparams_affine_with_min_max(
    min_val: Tensor,
    max_val: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = torch.int32,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> tuple[Tensor, Tensor | None]:
    """The same from the smallest and largest value of each block, as an observer has them."""
    bounds = quant_bounds(target_dtype, quant_min, quant_max)
    args = (min_val, max_val, mapping_type, bounds, eps, scale_dtype, zero_point_dtype)
    if zero_point_domain is ZeroPointDomain.NONE:
        return _from_extremes(*args)[0], None
    floats = zero_point_domain is ZeroPointDomain.FLOAT
    return _from_extremes(*args, preserve_zero=preserve_zero and not floats, floats=floats)


@torch.no_grad()
def choose_qparams_affine_tinygemm(
    input: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A scale and a zero point in units of the value, for tinygemm: the range is not widened to hold 0."""
    if mapping_type is not MappingType.ASYMMETRIC:
        raise MisfitError(f"tinygemm's zero point is a float and wants MappingType.ASYMMETRIC, got {mapping_type}.")
    low, high = _extremes(input, block_size, False)
    bounds = quant_bounds(target_dtype, quant_min, quant_max)
    return _from_extremes(
        low, high, mapping_type, bounds, eps, scale_dtype, zero_point_dtype, preserve_zero=False, floats=True
    )


@torch.no_grad()
def choose_qparams_affine_dont_preserve_zero(
    input: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = torch.int32,
) -> tuple[Tensor, Tensor]:
    """As `choose_qparams_affine` for ASYMMETRIC, but the range is not widened to hold 0."""
    if mapping_type is not MappingType.ASYMMETRIC:
        raise MisfitError(f"a range without zero wants MappingType.ASYMMETRIC, got {mapping_type}.")
    low, high = _extremes(input, block_size, False)
    bounds = quant_bounds(target_dtype, quant_min, quant_max)
    return _from_extremes(low, high, mapping_type, bounds, eps, scale_dtype, zero_point_dtype, preserve_zero=False)


def _extremes(x: Tensor, block_size: Sequence[int], keepdim: bool) -> tuple[Tensor, Tensor]:
    blocks = _Blocks.of(x, block_size)
    values = x.view(blocks.shape)
    low = values.amin(dim=blocks.axes) if blocks.axes else values
    high = values.amax(dim=blocks.axes) if blocks.axes else values
    if keepdim:
        counts = [length // block for length, block in zip(x.shape, block_size, strict=True)]
        return low.view(counts), high.view(counts)
    return low, high


def _from_extremes(
    low: Tensor,
    high: Tensor,
    mapping_type: MappingType,
    bounds: tuple[float, float],
    eps: float | None,
    scale_dtype: torch.dtype | None,
    zero_point_dtype: torch.dtype | None,
    *,
    preserve_zero: bool = True,
    floats: bool = False,
) -> tuple[Tensor, Tensor]:
    qmin, qmax = bounds
    scale_dtype = scale_dtype or low.dtype
    eps = torch.finfo(low.dtype).smallest_normal if eps is None else eps
    if preserve_zero:
        low, high = torch.clamp(low, max=0), torch.clamp(high, min=0)
    middle = (qmax + qmin + 1) / 2
    if mapping_type is MappingType.ASYMMETRIC:
        scale = torch.clamp((high - low) / float(qmax - qmin), min=eps)
        if floats:
            zero_point = low + scale * middle
        else:
            zero_point = torch.clamp(qmin - torch.round(low / scale), qmin, qmax)
    else:
        if mapping_type is MappingType.SYMMETRIC:
            scale = torch.maximum(-low, high) / (float(qmax - qmin) / 2)
        else:
            from_low, from_high = low / float(qmin), high / float(qmax)
            scale = torch.where(from_low > from_high, from_low, from_high)
        scale = torch.clamp(scale, min=eps)
        zero_point = torch.full_like(scale, int(middle))
    return scale.to(scale_dtype), zero_point.to(zero_point_dtype or low.dtype)


# -- quantize and dequantize ------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor | float,
    zero_point: Tensor | float | None,
    output_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
) -> Tensor:
    """The code of each number.

    Args:
        input: any shape. block_size: of the same rank. scale, zero_point: one for each block, or one number.
        output_dtype: of the codes; unsigned integers below 8 bits are stored as uint8.

    >>> quantize_affine(torch.tensor([[1.0, 2.6]]), (1, 2), torch.ones(1), torch.zeros(1), torch.int8)
    tensor([[1, 3]], dtype=torch.int8)
    """
    if zero_point is None:
        raise TypeError("quantize_affine wants a zero point, got None: pass zeros for a symmetric mapping.")
    codes = affine_codes(input, block_size, scale, zero_point, *quant_bounds(output_dtype, quant_min, quant_max))
    return codes.to(torch.uint8 if output_dtype in _SUB_BYTE_UNSIGNED else output_dtype)


@torch.no_grad()
def quantize_affine_tinygemm(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor,
    output_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
) -> Tensor:
    """The code of each number, for a zero point in units of the value: a true division, as tinygemm's."""
    qmin, qmax = quant_bounds(output_dtype, quant_min, quant_max)
    blocks = _Blocks.of(input, block_size)
    scale, zero_point = blocks.spread(scale), blocks.spread(zero_point)
    lowest = zero_point - scale * ((qmax + qmin + 1) / 2)
    codes = torch.clamp(torch.round((input.view(blocks.shape) - lowest) / scale), qmin, qmax).view(input.shape)
    return codes.to(torch.uint8 if output_dtype in _SUB_BYTE_UNSIGNED else output_dtype)


@torch.no_grad()
def quantize_affine_no_zero_point(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    output_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
) -> Tensor:
    """The code of each number where there is no zero point; `zero_point` is there for its place alone."""
    codes = affine_codes(input, block_size, scale, None, *quant_bounds(output_dtype, quant_min, quant_max))
    return codes.to(torch.uint8 if output_dtype in _SUB_BYTE_UNSIGNED else output_dtype)


def affine_codes(
    x: Tensor,
    block_size: Sequence[int],
    scale: Tensor | float,
    zero_point: Tensor | float | None,
    qmin: float,
    qmax: float,
) -> Tensor:
    """clamp(round(x * (1 / scale)) + zero_point), still as floats and in x's shape."""
    if not x.dtype.is_floating_point:
        raise AssertedError(
            f"Unsupported input dtype: {x.dtype}. Floats are quantized: pass float32, float16 or bfloat16."
        )
    blocks = _Blocks.of(x, block_size)
    inverse = 1.0 / blocks.spread(_tensor(scale, x))
    codes = torch.round(x.view(blocks.shape) * inverse)
    if zero_point is not None:
        codes = codes + blocks.spread(_tensor(zero_point, x))
    return torch.clamp(codes, qmin, qmax).view(x.shape)


def dequantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor | float,
    zero_point: Tensor | float | None,
    input_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    *,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The value of each code, (q - zero_point) * scale.

    >>> dequantize_affine(torch.tensor([[1, 3]], dtype=torch.int8), (1, 2), torch.full((1,), 0.5), None, torch.int8)
    tensor([[0.5000, 1.5000]])
    """
    _check_codes(input, input_dtype)
    return affine_values(input, block_size, scale, zero_point, output_dtype)


def dequantize_affine_no_zero_point(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    *,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The value of each code, q * scale."""
    _check_codes(input, input_dtype)
    return affine_values(input, block_size, scale, None, output_dtype)


def dequantize_affine_tinygemm(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor,
    input_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    *,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The value of each code, (q - middle) * scale + zero_point."""
    qmin, qmax = quant_bounds(input_dtype, quant_min, quant_max)
    blocks = _Blocks.of(input, block_size)
    values = (input.view(blocks.shape) - (qmax + qmin + 1) / 2).to(output_dtype) * blocks.spread(scale)
    return (values + blocks.spread(zero_point)).view(input.shape).to(output_dtype)


def affine_values(
    codes: Tensor,
    block_size: Sequence[int],
    scale: Tensor | float,
    zero_point: Tensor | float | None,
    dtype: torch.dtype,
) -> Tensor:
    """(q - zero_point) * scale in `dtype`, whatever dtype the codes come in."""
    blocks = _Blocks.of(codes, block_size)
    values = codes.view(blocks.shape).to(dtype)
    if zero_point is not None:
        values = values - blocks.spread(_tensor(zero_point, codes)).to(dtype)
    return (values * blocks.spread(_tensor(scale, codes))).view(codes.shape).to(dtype)


def _check_codes(codes: Tensor, dtype: torch.dtype) -> None:
    stored = torch.uint8 if dtype in _SUB_BYTE_UNSIGNED else dtype
    if codes.dtype != stored and not codes.dtype.is_floating_point:
        raise MisfitError(
            f"dequantize_affine wants codes of {stored}, got {codes.dtype}: pass input_dtype={codes.dtype}."
        )
    if codes.dtype != stored:
        raise MisfitError(f"dequantize_affine wants codes of {stored}, got {codes.dtype}: quantize_affine makes them.")


# -- float8 -----------------------------------------------------------------------------------------------------------


def choose_scale_float8(
    tensor: Tensor,
    block_size: Sequence[int],
    float8_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    hp_value_lb: float | None = None,
    hp_value_ub: float | None = None,
) -> Tensor:
    """amax / the largest float8, with the axes of the blocks kept; a block of zeros gets a scale of 1, not a NaN.

    Args:
        hp_value_lb, hp_value_ub: bounds of amax. scale_dtype: float32, or float8_e8m0fnu for the nearest power of two.
    """
    blocks = _Blocks.of(tensor, block_size)
    amax = tensor.abs().view(blocks.shape)
    amax = amax.amax(dim=blocks.axes, keepdim=True) if blocks.axes else amax
    amax = amax.view([length // block for length, block in zip(tensor.shape, block_size, strict=True)])
    if hp_value_lb is not None or hp_value_ub is not None:
        amax = torch.clamp(amax, min=hp_value_lb, max=hp_value_ub)
    scale = amax / torch.finfo(float8_dtype).max
    scale = torch.where(scale == 0, 1.0, scale)
    if scale_dtype is torch.float8_e8m0fnu:
        scale = torch.exp2(torch.round(torch.log2(scale)))
    return scale.to(torch.float32)


def quantize_affine_float8(tensor: Tensor, scale: Tensor, float8_dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """The float8 code of each number, saturated; `scale` as `choose_scale_float8` answers it."""
    largest = torch.finfo(float8_dtype).max
    scaled = tensor.to(torch.float32) / spread_over(scale, tensor.shape)
    return scaled.clamp(-largest, largest).to(float8_dtype)


def dequantize_affine_float8(tensor: Tensor, scale: Tensor, output_dtype: torch.dtype = torch.float32) -> Tensor:
    """The value of each float8 code."""
    return (tensor.to(torch.float32) * spread_over(scale, tensor.shape)).to(output_dtype)


def spread_over(scale: Tensor, target_shape: Sequence[int]) -> Tensor:
    """A scale for each block, repeated to one for each element."""
    if tuple(scale.shape) == tuple(target_shape) or scale.numel() == 1:
        return scale
    for axis, length in enumerate(target_shape):
        if scale.shape[axis] not in (1, length):
            scale = scale.repeat_interleave(length // scale.shape[axis], dim=axis)
    return scale


# -- quantize and dequantize at once ------------------------------------------------------------------------------------


def fake_quantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    quant_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> Tensor:
    """What quantization does to the numbers; the gradient passes where a number is inside the range and is 0 elsewhere.

    Raises:
        MisfitError: a zero point of the domain FLOAT.
    """
    return fake_quantize_affine_cachemask(
        input, block_size, scale, zero_point, quant_dtype, quant_min, quant_max, zero_point_domain
    )[0]


def fake_quantize_affine_cachemask(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    quant_dtype: torch.dtype,
    quant_min: Bound = None,
    quant_max: Bound = None,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> tuple[Tensor, Tensor]:
    """The same, and which numbers lie inside the range."""
    if zero_point_domain is ZeroPointDomain.FLOAT:
        raise MisfitError("a fake quantizer wants an integer zero point or none, got ZeroPointDomain.FLOAT.")
    qmin, qmax = quant_bounds(quant_dtype, quant_min, quant_max)
    offset = zero_point if zero_point_domain is ZeroPointDomain.INT else None
    with torch.no_grad():
        unclamped = affine_codes(input, block_size, scale, offset, -torch.inf, torch.inf)
        inside = (unclamped >= qmin) & (unclamped <= qmax)
        values = affine_values(unclamped.clamp(qmin, qmax), block_size, scale, offset, input.dtype)
    return _StraightThrough.apply(input, values, inside), inside


class _StraightThrough(torch.autograd.Function):
    """Values that stand for an input: its gradient passes where it is inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None
