"""The plain layout: each part under its own name, codes packed at their true width along K.

    qdata     elements below 8 bits: uint8 (..., N, ceil(K * bits / 8)), a little-endian stream of bits; else the element's dtype
    others    as in `Parts`

It is the layout of checkpoints and of every device, and it can be cut in place along every axis: a slice of rows is a slice of
each tensor, so narrow + copy_ writes where it should. A cut across K must fall on whole bytes and whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import ELEMENTS, Format, Parts
from ..numerics.bits import pack_bits, packed_columns, unpack_bits
from ..numerics.math import ZERO_POINT_DTYPES
from .base import Layout, Packed, Spec


def _pack(parts: Parts, spec: Spec) -> Packed:
    element = spec.weight.element
    if element.bits < 8:
        parts = parts.replace(qdata=pack_bits(element.to_codes(parts.qdata), element.bits))
    return parts.tensors()


def _unpack(packed: Packed, spec: Spec) -> Parts:
    element, parts = spec.weight.element, Parts.of(packed)
    if element.bits < 8:
        parts = parts.replace(qdata=element.from_codes(unpack_bits(parts.qdata, element.bits, spec.shape[-1])))
    return parts


def tensor_shapes(fmt: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each packed tensor of a format: to allocate, to check a file, to count bytes.

    >>> tensor_shapes(Format.parse("int4/1x32*bf16"), (8, 64))["qdata"]
    ((8, 32), torch.uint8)
    """
    element, scale_shape = fmt.element, () if fmt.is_identity else fmt.scale_shape(shape)
    columns = packed_columns(shape[-1], element.bits) if element.bits < 8 else shape[-1]
    out = {"qdata": ((*shape[:-1], columns), torch.uint8 if element.bits < 8 else element.dtype)}
    if fmt.is_identity:
        return out
    nested = fmt.nested
    out["scale"] = (scale_shape, nested.element.dtype if nested else ELEMENTS[str(fmt.scale)].dtype)
    if fmt.zero_point:
        out["zero_point"] = (scale_shape, ZERO_POINT_DTYPES[fmt.zero_point])
    if nested:
        out["scale_scale"] = (nested.scale_shape(scale_shape), torch.float32)
        if nested.zero_point:
            out["scale_zero_point"] = (nested.scale_shape(scale_shape), torch.float32)
    return out


def cut(packed: Packed, spec: Spec, axis: int, start: int, stop: int) -> Packed:
    """The elements [start, stop) along an axis of the quantized shape, as views of the packed tensors.

    Raises:
        MisfitError: the cut splits a block or a byte.
    """
    axis = axis % len(spec.shape) - len(spec.shape)  # counted from the end: -1 is K, -2 is N
    return {name: cut_part(name, tensor, spec, axis, start, stop) for name, tensor in packed.items()}


def cut_part(name: str, tensor: Tensor, spec: Spec, axis: int, start: int, stop: int) -> Tensor:
    """The same for one packed tensor; axis: counted from the end."""
    if name == "act_rotation" and axis == -1 and stop - start != spec.shape[-1]:
        raise MisfitError(
            f"a cut [{start}:{stop}] of the last axis splits columns that are rotated as one: cut rows only."
        )
    if name in ("act_scale", "act_rotation") or (name == "act_pre_scale" and axis != -1):
        return tensor
    if axis < -2 or name == "act_pre_scale":
        return tensor.narrow(axis, start, stop - start)
    if name == "qdata":
        first, last = (start, stop) if axis == -2 else _bytes_of(start, stop, spec)
        return tensor.narrow(axis, first, last - first)
    step = _elements_per_entry(name, spec.weight, spec.shape, axis)
    if step is None:
        return tensor
    if start % step or stop % step:
        raise MisfitError(
            f"a cut [{start}:{stop}] of axis {axis} splits a block of {spec.weight}, "
            f"which holds {step} along it: cut at multiples of {step}."
        )
    return tensor.narrow(axis, start // step, (stop - start) // step)


def _bytes_of(start: int, stop: int, spec: Spec) -> tuple[int, int]:
    bits = spec.weight.element.bits
    if bits >= 8:
        return start, stop
    if start * bits % 8 or (stop * bits % 8 and stop != spec.shape[-1]):
        raise MisfitError(
            f"a cut [{start}:{stop}] of the last axis splits a byte of {spec.weight}: cut at multiples of 8."
        )
    return start * bits // 8, packed_columns(stop, bits)


def _elements_per_entry(name: str, fmt: Format, shape: tuple[int, ...], axis: int) -> int | None:
    """How many elements along an axis share one entry of a scale-like tensor; None: all of them, whatever the size."""
    if fmt.block == "tensor" or (fmt.block == "row" and axis == -1):
        return None
    step = fmt.block_dims(shape)[axis]
    nested = fmt.nested
    if name in ("scale", "zero_point") or nested is None:
        return step
    if nested.block == "tensor" or (nested.block == "row" and axis == -1):
        return None
    return step * nested.block_dims(fmt.scale_shape(shape))[axis]


def _why_not(fmt: Format, shape: tuple[int, ...], device: str) -> str:
    try:
        fmt.scale_shape(shape) if not fmt.is_identity else ()
    except MisfitError as error:
        return str(error)
    return ""


LAYOUTS = (
    Layout(
        name="plain",
        about="each part by its name, codes packed at their true width along K",
        pack=_pack,
        unpack=_unpack,
        why_not=_why_not,
        cut=cut,
    ),
)
