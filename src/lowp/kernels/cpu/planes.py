"""Weights in 1 to 8 bits on the CPU: for every element, for every batch, from AVX2 and NEON to AVX-512.

    y_MN = act_quantize(x_MK) @ ((qdata_NK - zero_point) * scale).T + bias_N

What is multiplied is decided by the scheme:

    int8 activations, integer or e2m1 weights   codes times codes, int32 sums, scales after: the numbers of the reference
    no activation format                        x stays a float: codes are decoded to bf16 (AVX512-BF16) or float32, sums are
                                                float32; an x of fp16 or float32 is split into 2 or 3 numbers of bf16 that add up
                                                to it exactly, so nothing of it is lost. Where x is bf16 and has many rows,
                                                codes times scales of short groups are rounded to bf16 before the product
    e4m3/row activations                        x is rounded to e4m3, which bf16 holds, and multiplied as a float; the token's
                                                scale comes after
    any other activation format                 x is quantized and dequantized first, then as above

Up to 8 tokens the weight is streamed once, decoded on its way; beyond that it is decoded by panels that stay in the cache. The
library picks its instruction set when it is loaded. The C++ and its lesson stand in `native/`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...layouts import LAYOUTS, Spec
from ...layouts.base import Packed
from ...layouts.tiled import by_group
from ...numerics import Format, Scheme, known_formats
from ...ops.cast import fake_cast
from ...ops.how import decoded, native, with_activation
from ...ops.linear import prescale
from ...ops.matmul import reference as matmul_reference
from ...ops.registry import Case, Kernel
from .library import missing

_FLOATS = ("bfloat16", "float16", "float32")
_FLOAT_TYPES = tuple(getattr(torch, name) for name in _FLOATS)
_SPECIALS = ("none", "ieee", "fn", "fnuz")
_MISSING = missing()  # loads the library now: this module is imported when a kernel is first asked for

_OPS = torch.library.Library("lowp", "FRAGMENT")
_WEIGHT = "Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? scale_scale, Tensor? scale_zero_point"
_FORMAT = "int[] format, float[] codebook"
_OPS.define(
    f"planes_linear(Tensor x, {_WEIGHT}, Tensor? row_sum, Tensor? act_scale, Tensor? bias, {_FORMAT}) -> Tensor"
)
_OPS.define(
    f"planes_grouped(Tensor x, {_WEIGHT}, Tensor? row_sum, Tensor? act_scale, Tensor? offs, {_FORMAT}) -> Tensor"
)
_OPS.define(f"planes_embedding(Tensor ids, {_WEIGHT}, {_FORMAT}) -> Tensor")


@torch.library.register_fake("lowp::planes_linear", lib=_OPS)
def _(x, qdata, scale, zero_point, scale_scale, scale_zero_point, row_sum, act_scale, bias, format, codebook):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], format[0]))


@torch.library.register_fake("lowp::planes_grouped", lib=_OPS)
def _(x, qdata, scale, zero_point, scale_scale, scale_zero_point, row_sum, act_scale, offs, format, codebook):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], format[0]))


@torch.library.register_fake("lowp::planes_embedding", lib=_OPS)
def _(ids, qdata, scale, zero_point, scale_scale, scale_zero_point, format, codebook):  # type: ignore[no-untyped-def]
    return scale.new_empty((ids.shape[0], format[1]), dtype=torch.float32)


# -- what the library is told -----------------------------------------------------------------------------------------


def _multiplies_codes(scheme: Scheme) -> bool:
    """Whether both operands stay codes: integers times int8, and e2m1, whose doubles are integers."""
    act = scheme.act
    if act is None or act.element.name != "int8" or act.nested is not None or act.scale != "fp32":
        return False
    blocks = act.block.removeprefix("1x")
    by_row = act.block == "row" or (blocks.isdigit() and int(blocks) % 32 == 0 and not act.zero_point)
    exact = scheme.weight.element.kind == "int" or scheme.weight.element.name == "e2m1"
    return exact and by_row and act.zero_point in (None, "int8") and act.rule in ("absmax", "asymmetric")


def _taken_as(scheme: Scheme) -> int:
    """How the product takes the activation: 0 as floats, 1 and 2 as int8 without and with a zero point, 3 as e4m3 by token."""
    act = scheme.act
    if act is None:
        return 0
    if _multiplies_codes(scheme):
        return 2 if act.zero_point else 1
    by_token = act.block == "row" and act.scale == "fp32" and not act.zero_point
    return 3 if act.element.name == "e4m3" and by_token and act.rule == "absmax" else 0


def _side_by_side(bits: int, *numbers: int) -> int:
    """Numbers of so many bits each in one of 64, the first lowest."""
    word = 0
    for place, number in enumerate(numbers):
        word |= (number & ((1 << bits) - 1)) << (bits * place)
    return word


@functools.cache
def _told(spelling: str, shape: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """What `Format` in ops.cpp holds, in words of 64 bits, and the codebook."""
    scheme = Scheme.parse(spelling)
    fmt, act, matrix = scheme.weight, scheme.act, shape[-2:]
    element, nested = fmt.element, fmt.nested
    is_int = element.kind == "int"
    nest = nested.block_dims(fmt.scale_shape(shape)) if nested else (1, 1)
    taken = _taken_as(scheme)
    group = fmt.block_dims(matrix)[1] if by_group(fmt) else -1 if fmt.block == "tensor" else 0
    act_group = int(act.block.removeprefix("1x")) if act is not None and taken and act.block != "row" else 0
    offset = 2 ** (element.bits - 1) if is_int and element.signed else 0
    specials = _SPECIALS.index(element.specials) if element.specials in _SPECIALS else 0
    return [
        *matrix,
        _side_by_side(32, group, act_group),
        _side_by_side(32, nest[0], nest[1]),
        _side_by_side(16, element.bits, is_int, offset, element.signed),
        _side_by_side(16, element.ebits, element.mbits, element.bias, specials),
        _side_by_side(16, taken, not is_int),
    ], list(element.values) if element.kind == "codebook" else []


@functools.cache
def _emulated(spelling: str) -> Format | None:
    """The activation format of a scheme where the product does not take it."""
    scheme = Scheme.parse(spelling)
    return None if _taken_as(scheme) else scheme.act


def _activation(x: Tensor, packed: Packed, spec: Spec) -> Tensor:
    """x as the product wants it: pre-scaled, and emulated in a format that the product does not take."""
    act = _emulated(spec.scheme)
    if act is not None:
        x = fake_cast(x, act, packed.get("act_scale"), packed.get("act_pre_scale"))
    elif "act_pre_scale" in packed:
        x = prescale(x, packed)
    return x if x.stride(-1) == 1 else x.contiguous()


def _weight(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    get = packed.get
    return packed["qdata"], packed["scale"], get("zero_point"), get("scale_scale"), get("scale_zero_point")


def _stack(packed: Packed) -> tuple[Tensor | None, ...]:
    """`_weight` and the sums of rows of a stack of matrices, whose cut along the rows leaves gaps between the matrices."""
    parts = (*_weight(packed), packed.get("row_sum"))
    return tuple(part if part is None else part.contiguous() for part in parts)


def _static_scale(packed: Packed) -> Tensor | None:
    return packed["act_scale"].to(torch.float32) if "act_scale" in packed else None


def _linear(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    x = _activation(x_MK, packed, spec)
    if bias is not None:
        bias = (bias if bias.dtype in _FLOAT_TYPES else bias.to(torch.float32)).contiguous()
    y_MN: Tensor = torch.ops.lowp.planes_linear(
        x, *_weight(packed), packed.get("row_sum"), _static_scale(packed), bias, *_told(spec.scheme, spec.shape)
    )
    return y_MN


def _grouped(x: Tensor, packed: Packed, spec: Spec, offs: Tensor | None) -> Tensor:
    x = _activation(x, packed, spec)
    y: Tensor = torch.ops.lowp.planes_grouped(
        x, *_stack(packed), _static_scale(packed), offs, *_told(spec.scheme, spec.shape)
    )
    return y


def _matmul(x: Tensor, packed: Packed, spec: Spec, transposed: bool) -> Tensor:
    if not transposed or x.dim() != 3 or x.shape[0] != spec.shape[0]:
        return matmul_reference(x, packed, spec, transposed, dtype=x.dtype)
    told = _told(str(spec.weight), spec.shape)  # a matmul leaves x as it is, whatever the scheme
    x = x if x.stride(-1) == 1 else x.contiguous()
    y: Tensor = torch.ops.lowp.planes_grouped(x, *_stack(packed), None, None, *told)
    return y


def _embedding(ids: Tensor, packed: Packed, spec: Spec, dtype: torch.dtype) -> Tensor:
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    rows: Tensor = torch.ops.lowp.planes_embedding(flat, *_weight(packed), *_told(spec.scheme, spec.shape))
    if dtype == torch.float16:  # as `dequantize`: a finite value never becomes infinite
        largest = torch.finfo(dtype).max
        rows = torch.where(rows.isinf(), rows, rows.clamp(-largest, largest))
    return rows.to(dtype).reshape(*ids.shape, spec.shape[-1])


# -- what it can run --------------------------------------------------------------------------------------------------


def _why_not_scheme(scheme: Scheme, extras: tuple[str, ...] = ()) -> str:
    weight, act = scheme.weight, scheme.act
    nested = weight.nested
    if nested is not None and nested.element.name not in ("int8", "e4m3"):
        return f"wants scales that are floats, int8 or e4m3, got {weight}"
    if weight.element.specials == "nan":
        return f"wants elements with a sign, got {weight.element.name}"
    if "act_scale" in extras and (act is None or act.zero_point):
        return "wants a static scale without a zero point"
    return ""


def _why_not(case: Case, axes: int) -> str:
    if case.device != "cpu":
        return f"wants cpu, got {case.device}"
    if case.dtype not in _FLOATS:
        return f"wants {', '.join(_FLOATS)}, got {case.dtype}"
    if len(case.shape) != axes:
        return f"wants {'a matrix' if axes == 2 else 'a stack of matrices'}, got shape {case.shape}"
    return _why_not_scheme(Scheme.parse(case.scheme), case.extras) or _MISSING


def _how(case: Case) -> str:
    scheme = Scheme.parse(case.scheme)
    if _multiplies_codes(scheme):
        return native(case, f"{scheme.weight.element.name} times int8 in dot products of bytes with int32 sums")
    return with_activation(case, f"{decoded(case, 'in registers', 'bf16 or fp32')}, fp32 sums")


def _cases() -> tuple[str, ...]:
    known = [(one.spelling, Scheme.parse(one.spelling)) for one in known_formats()]
    fits = LAYOUTS["planes"].why_not
    names = [name for name, one in known if not fits(one.weight, (256, 256), "cpu") and not _why_not_scheme(one)]
    return (*names, *_MORE)


# What the table of known formats does not have, but the products have ways of their own for.
_MORE = (
    "int4/1x32*fp16",
    "int4/1x32*bf16@int8/1x32",
    "int2/1x64*bf16@int8/row",
    "int3/1x128*fp16@int8/row+int8",
    "int5/1x32*bf16+int8@int8/1x128",
    "int7/row@int8/row+int8",
    "int1/1x32*bf16+bf16@int8/row",
    "uint8/row+uint8@int8/row",
    "ternary/row*bf16@int8/row",
    "e2m1/1x32*e8m0@int8/row",
    "e2m1/1x16*e4m3/tensor@int8/1x32",
)


KERNELS = (
    Kernel(
        op="linear",
        name="planes",
        rank=60,
        layout="planes",
        why_not=functools.partial(_why_not, axes=2),
        run=_linear,
        how=_how,
        about="planes of bits, decoded in registers (C++)",
        cases=_cases(),
    ),
    Kernel(
        op="grouped",
        name="planes",
        rank=60,
        layout="planes",
        why_not=functools.partial(_why_not, axes=3),
        run=_grouped,
        how=_how,
        about="planes of bits, expert by expert (C++)",
        cases=("int4/1x32*bf16", "int4/1x32*bf16@int8/row+int8", "nf4/1x64*int8/1x256"),
    ),
    Kernel(
        op="matmul",
        name="planes",
        rank=60,
        layout="planes",
        why_not=functools.partial(_why_not, axes=3),
        run=_matmul,
        how=lambda case: (
            f"{decoded(case, 'in registers', 'bf16 or fp32')} for (E, M, K) x (E, N, K), else for each call"
        ),
        about="(E, M, K) x (E, N, K) as grouped (C++); any other decoded, then torch's matmul",
    ),
    Kernel(
        op="embedding",
        name="planes",
        rank=60,
        layout="planes",
        why_not=functools.partial(_why_not, axes=2),
        run=_embedding,
        how=lambda case: f"{decoded(case, 'row by row', 'fp32')}",
        about="rows decoded out of planes of bits (C++)",
    ),
)
