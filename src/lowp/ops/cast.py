"""cast: an activation into a low-precision format, on the way into a product.

    cast            x_MK -> Parts                          codes and scales, as `quantize` answers them
    fake_cast       x_MK -> values in x's dtype            quantized and dequantized: what a float product wants to see
    cast_codes_as   x_MK -> codes in bf16 or fp16, scale_M    for a float product that multiplies by the token's scale after
    cast_interleaved    x_MK -> codes of 8 bits, scale_M      for a product that wants the halves of each 16 columns interleaved;
                                                              math in float32, as fake_cast

    cast_both       x_MK -> Parts of x_MK, Parts of its transpose     what training needs: the products of a linear layer forward
                                                              and backward contract over K and over M

The first four multiply by `pre_scale` (AWQ, SmoothQuant) where there is one, and take the scale from the token itself
(dynamic) or from `act_scale` (static). The references below are `numerics`; a kernel answers the same bytes and scales, in one
pass over memory.

Codes of int8, e4m3 and e5m2 are exact in bf16 and in fp16, and so is an int8 code less its zero point, at most 255.

Legend: M tokens, K input channels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..numerics import ELEMENTS, Format, Parts, dequantize, quantize
from ..numerics.math import ZERO_POINT_DTYPES, quantize_given, to_blocks
from .operator import define, plain
from .registry import Case, Kernel, device_capability, pick


def cast(x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None) -> Parts:
    """Quantize an activation.

    Args:
        x_MK: (..., M, K), any float dtype. fmt: the activation's format. act_scale: () or None, a static scale.
        pre_scale: (K,) or None; x is multiplied by it, in x's dtype.

    Returns:
        Parts, as `numerics.quantize` answers them (with `act_scale`: as `quantize_given`).

    Raises:
        MisfitError: blocks that do not divide the shape.
    """
    parts: Parts = _kernel("cast", x_MK, fmt, act_scale, pre_scale).run(x_MK, fmt, act_scale, pre_scale)
    return parts


def fake_cast(x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None) -> Tensor:
    """Quantize an activation and dequantize it again: arguments as for `cast`, math in float32 (the pre-scaling too).

    Returns:
        x's shape and dtype: bit for bit `act_values(x_MK, packed, spec, torch.float32).to(x_MK.dtype)`.
    """
    values: Tensor = _kernel("fake_cast", x_MK, fmt, act_scale, pre_scale).run(x_MK, fmt, act_scale, pre_scale)
    return values


def cast_codes_as(
    x_MK: Tensor, fmt: Format, dtype: torch.dtype, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize an activation to codes that stand in `dtype`, and its scales apart: value = codes * scale_M[:, None].

    Args:
        x_MK: (M, K). fmt: a format with a scale for each row or for the tensor. dtype: torch.bfloat16 or torch.float16.

    Returns:
        (M, K) codes less their zero point, in `dtype`; (M,) scales, float32, contiguous.
    """
    kernel = _kernel("cast_codes_as", x_MK, fmt, act_scale, pre_scale)
    answer: tuple[Tensor, Tensor] = kernel.run(x_MK, fmt, dtype, act_scale, pre_scale)
    return answer


def cast_interleaved(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize an activation for `kernels/cuda_/multiply8.cu`: column 8 h + i of each 16 stands at 2 i + h.

    Args:
        x_MK: (M, K), K a multiple of 16. fmt: codes of 8 bits without a zero point, a float32 scale for each row.

    Returns:
        (M, K) codes in that order, in the element's dtype; (M,) scales, float32, contiguous. The codes are those of x in float32
        times pre_scale, like the values of `fake_cast`.

    Raises:
        KernelError: another format or shape.
    """
    kernel = _kernel("cast_interleaved", x_MK, fmt, act_scale, pre_scale)
    answer: tuple[Tensor, Tensor] = kernel.run(x_MK, fmt, act_scale, pre_scale)
    return answer


def cast_both(
    x_MK: Tensor,
    rows: str | None,
    columns: str | None,
    *,
    act_scale: Tensor | None = None,
    multiple: int = 1,
    stochastic: bool = False,
    after: Tensor | None = None,
) -> list[Tensor]:
    """Quantize a matrix for a product over its columns, and its transpose for a product over its rows.

    Args:
        x_MK: (M, K), any float dtype. rows: spelling of the format of x_MK, or None. columns: of its transpose (K, M), or None.
        act_scale: () or None, a static scale of formats with one scale for the tensor.
        multiple: rows of zeros are added below until M is a multiple, for the transposed form alone.
        stochastic: round at random, unbiased.
        after: a tensor that must be there before, not looked at: a compiled graph moves no cast from backward to forward that
            waits for a gradient.

    Returns:
        The tensors of the forms asked for, rows first, each in the order of `part_names` of its format: a Parts as
        torch.compile can hold it; `parts_of` reads it.

    Raises:
        MisfitError: blocks that do not divide the shape.
    """
    args = (x_MK, rows or "", columns or "", act_scale, multiple)
    if plain(x_MK):
        return _cast_both(*args, stochastic)
    operator = torch.ops.lowp.cast_both_random if stochastic else torch.ops.lowp.cast_both
    made: list[Tensor] = operator(*args, after)
    return made


def cast_turned(tensors: list[Tensor], fmt: str, to: str, dtype: torch.dtype) -> list[Tensor]:
    """The transpose of a matrix of which only the codes are at hand.

    Args:
        tensors: of (N, K) in the format `fmt`. to: the format of the transpose (K, N), or "" for floats in `dtype`.

    Returns:
        The tensors of the transpose. The codes themselves where one scale serves a square or the whole, else cast anew from the
        values: then numbers are rounded twice, but for scales that are powers of two, where only the smallest are.
    """
    args = (tensors, fmt, to, dtype)
    made: list[Tensor] = _cast_turned(*args) if plain(tensors[0]) else torch.ops.lowp.cast_turned(*args)
    return made


def _cast_turned(tensors: list[Tensor], fmt: str, to: str, dtype: torch.dtype) -> list[Tensor]:
    parsed = Format.parse(fmt)
    rows, _, columns = parsed.block.partition("x")
    if fmt == to and (parsed.block == "tensor" or rows == columns) and parsed.nested is None:
        return [
            tensor.t().clone(memory_format=torch.contiguous_format) for tensor in tensors
        ]  # never the operand itself
    values = dequantize(parts_of(tensors, parsed), parsed, torch.float32 if to else dtype)
    return _cast_both(values, "", to, None, 1) if to else [values.t().contiguous()]


def _turned_fake(tensors: list[Tensor], fmt: str, to: str, dtype: torch.dtype) -> list[Tensor]:
    shape = (tensors[0].shape[1], tensors[0].shape[0])
    return empty_parts(tensors[0], Format.parse(to), shape) if to else [tensors[0].new_empty(shape, dtype=dtype)]


def part_names(fmt: Format) -> tuple[str, ...]:
    """The names of the parts that a format without a zero point for its scales has, in order."""
    more = (("zero_point", fmt.zero_point), ("scale_scale", fmt.nested))
    return ("qdata", *(() if fmt.is_identity else ("scale",)), *(name for name, there in more if there))


def parts_of(tensors: list[Tensor], fmt: Format) -> Parts:
    """The parts of a list that `cast_both` made."""
    return Parts(**dict(zip(part_names(fmt), tensors, strict=True)))


def empty_parts(x: Tensor, fmt: Format, shape: tuple[int, ...]) -> list[Tensor]:
    """Uninitialised tensors of the parts that a tensor of `shape` has: for operators whose shapes are asked for."""
    scale_shape = (1, 1) if fmt.block == "tensor" else fmt.scale_shape(shape)
    nested = fmt.nested
    out = [x.new_empty(shape, dtype=fmt.element.dtype)]
    out.append(x.new_empty(scale_shape, dtype=nested.element.dtype if nested else ELEMENTS[str(fmt.scale)].dtype))
    if fmt.zero_point:
        out.append(x.new_empty(scale_shape, dtype=ZERO_POINT_DTYPES[fmt.zero_point]))
    if nested:
        out.append(x.new_empty((1, 1), dtype=torch.float32))
    return out


def case_of_cast(op: str, x_MK: Tensor, fmt: Format, act_scale: Tensor | None, pre_scale: Tensor | None) -> Case:
    """The case of a cast: its scheme is the activation's format, its shape (K,), whatever the number of tokens."""
    device = x_MK.device
    named = (("act_pre_scale", pre_scale), ("act_scale", act_scale))
    return Case(
        op=op,
        scheme=str(fmt),
        device=device.type,
        sm=device_capability(device.type, device.index),
        dtype=str(x_MK.dtype).removeprefix("torch."),
        shape=(int(x_MK.shape[-1]),),
        extras=tuple(name for name, tensor in named if tensor is not None),
    )


_KERNELS: dict[
    Any, tuple[Kernel, Format]
] = {}  # by what a case is made of; it holds the format, so that its id stays its own


def _kernel(op: str, x: Tensor, fmt: Format, act_scale: Tensor | None, pre_scale: Tensor | None) -> Kernel:
    if type(x) is not Tensor or torch.compiler.is_compiling():  # a traced size cannot be looked up
        return pick(case_of_cast(op, x, fmt, act_scale, pre_scale))
    key = (op, id(fmt), x.dtype, x.device, x.shape[-1], act_scale is None, pre_scale is None)
    found = _KERNELS.get(key)
    if found is None or found[0].fallback:  # a fallback is picked anew: strict mode may have begun
        found = _KERNELS[key] = pick(case_of_cast(op, x, fmt, act_scale, pre_scale)), fmt
    return found[0]


def _cast_both(
    x: Tensor, rows: str, columns: str, act_scale: Tensor | None, multiple: int, stochastic: bool = False
) -> list[Tensor]:
    extras = (("rows", rows), ("columns", columns), ("act_scale", act_scale is not None), ("stochastic", stochastic))
    device = x.device
    named = tuple(name for name, there in extras if there)
    case = case_of_both("cast_both", rows, columns, device.type, device.index, x.dtype, x.shape[-1], named)
    made: list[Tensor] = pick(case).run(x, rows, columns, act_scale, multiple, stochastic)
    return made


@functools.lru_cache(maxsize=4096)
def case_of_both(
    op: str, rows: str, columns: str, device: str, index: int | None, dtype: torch.dtype, width: int,
    extras: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    """The case of an op that casts x by row and by column, made once for each kind of call: both forms are one scheme."""
    return Case(
        op=op,
        scheme="@".join(form for form in (rows, columns) if form),
        device=device,
        sm=device_capability(device, index),
        dtype=str(dtype).removeprefix("torch."),
        shape=(width,),
        extras=extras,
    )


def _both_fake(
    x: Tensor, rows: str, columns: str, act_scale: Tensor | None, multiple: int, after: Tensor | None
) -> list[Tensor]:
    tokens, width = x.shape
    made = empty_parts(x, Format.parse(rows), (tokens, width)) if rows else []
    height = (tokens + multiple - 1) // multiple * multiple
    return made + (empty_parts(x, Format.parse(columns), (width, height)) if columns else [])


# Two operators: layers that read the same x (q, k and v) share one cast in a compiled graph, but no random draw is shared.
_SCHEMA = "(Tensor x, str rows, str columns, Tensor? act_scale, int multiple, Tensor? after) -> Tensor[]"
for _name, _random in (("cast_both", False), ("cast_both_random", True)):

    def _operator(
        x: Tensor, rows: str, columns: str, act_scale: Tensor | None, multiple: int, after: Tensor | None,
        stochastic: bool = _random,
    ) -> list[Tensor]:  # fmt: skip
        return _cast_both(x, rows, columns, act_scale, multiple, stochastic)

    define(_name, _SCHEMA, _operator, _both_fake, random=_random)
define("cast_turned", "(Tensor[] tensors, str fmt, str to, ScalarType dtype) -> Tensor[]", _cast_turned, _turned_fake)


# -- the references ---------------------------------------------------------------------------------------------------


def reference(x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None) -> Parts:
    """The meaning of cast. What integers cannot hold, a NaN, makes the scale of its block NaN, a static one too."""
    x = x_MK if pre_scale is None else x_MK * pre_scale.to(x_MK.dtype)
    if act_scale is None:
        return quantize(x, fmt)
    scale = act_scale.expand(fmt.scale_shape(tuple(x.shape)))
    if fmt.element.kind == "int":
        lost = to_blocks(x.isnan(), fmt.block_dims(tuple(x.shape))).any(dim=-1).any(dim=-2)
        scale = torch.where(lost, torch.nan, scale)
    return quantize_given(x, fmt, scale)


def fake_reference(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> Tensor:
    """The meaning of fake_cast."""
    return dequantize(reference(x_MK.to(torch.float32), fmt, act_scale, pre_scale), fmt).to(x_MK.dtype)


def codes_reference(
    x_MK: Tensor, fmt: Format, dtype: torch.dtype, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The meaning of cast_codes_as."""
    parts = reference(x_MK, fmt, act_scale, pre_scale)
    assert parts.scale is not None
    codes = fmt.element.decode(parts.qdata)
    codes = codes if parts.zero_point is None else codes - parts.zero_point.to(torch.float32)
    return codes.to(dtype), parts.scale.to(torch.float32).reshape(-1).expand(x_MK.shape[0]).contiguous()


def why_not_interleaved(case: Case) -> str:
    """ "" or why `cast_interleaved` has no answer for a case."""
    fmt = case.weight
    if fmt.element.bits != 8 or fmt.block != "row" or fmt.scale != "fp32" or fmt.zero_point:
        return f"wants codes of 8 bits with an fp32 scale for each token, got {fmt}"
    return "" if case.shape[-1] % 16 == 0 else f"wants K in multiples of 16, got {case.shape[-1]}"


def interleaved_reference(
    x_MK: Tensor, fmt: Format, act_scale: Tensor | None = None, pre_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The meaning of cast_interleaved."""
    parts = reference(x_MK.to(torch.float32), fmt, act_scale, pre_scale)
    assert parts.scale is not None
    codes = parts.qdata.view(torch.uint8).unflatten(-1, (-1, 2, 8)).mT.flatten(-3).contiguous()
    return codes.view(parts.qdata.dtype), parts.scale.reshape(-1).expand(x_MK.shape[0]).contiguous()


def both_reference(
    x_MK: Tensor,
    rows: str,
    columns: str,
    act_scale: Tensor | None = None,
    multiple: int = 1,
    stochastic: bool = False,
) -> list[Tensor]:
    """The meaning of cast_both."""

    def one(x: Tensor, fmt: Format) -> list[Tensor]:
        parts = quantize(x, fmt, stochastic=True) if stochastic else reference(x, fmt, act_scale)
        return list(parts.tensors().values())

    made = one(x_MK, Format.parse(rows)) if rows else []
    if not columns:
        return made
    below = torch.nn.functional.pad(x_MK, (0, 0, 0, -x_MK.shape[0] % multiple))
    return made + one(below.t().contiguous(), Format.parse(columns))
