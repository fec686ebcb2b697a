"""States of an optimizer: which tensors are kept in few bits, in what shape, and how they are read and filled.

A state of a parameter (..., K) is a QTensor of the same shape. Where blocks of 1 x B do not divide K they run on over the rows:
the state is then quantized as one axis of all elements and shown in the parameter's shape.

    quantized      at least 4096 elements, in whole blocks: B divides the number of elements
    in float32     all others: biases, norms, odd shapes. They are few, and they are the ones that 8 bits hurt

The second moment is never negative: "dyn8/1x256" puts it into the unsigned map of the same bits. A pair names both formats.

A DTensor's state is a DTensor of the same placement over local states. All ranks must decide alike, whatever their shard, so
blocks have to divide the rows of every shard there.

Source of the threshold: Dettmers et al., arXiv 2110.02861, section 2.3 (and torchao's and bitsandbytes' default).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError, SpellingError
from ..layouts.base import Packed
from ..layouts.plain import tensor_shapes
from ..numerics import Format, quantize
from ..numerics.formats.dynamic import UNSIGNED
from ..tensor import QTensor

SMALLEST = 4096  # elements of the smallest tensor that is quantized

State = str | Sequence[str]


def scheme_of(state: State) -> str:
    """The scheme of an op from how a user spells the states: first moment's format, "@", the other moments'.

    >>> scheme_of("dyn8/1x256")
    'dyn8/1x256@udyn8/1x256'
    """
    if not isinstance(state, str):
        if len(state) != 2:
            raise SpellingError(f"state wants one format or a pair for first and second moments, got {state!r}.")
        first, second = (Format.parse(one) for one in state)
        if not (first.element.signed or first.zero_point):
            raise SpellingError(f"a first moment has both signs, so state wants a signed format for it, got {first}.")
        return f"{first}@{second}"
    if "@" in state:
        return scheme_of(state.split("@"))
    first = Format.parse(state)
    name = UNSIGNED.get(first.element.name)
    return scheme_of((state, str(first).replace(first.element.name, name, 1) if name else str(first)))


_PLAIN = (Tensor, torch.nn.Parameter)  # what most are: a look for an attribute that is not there takes longer


def is_dtensor(x: Any) -> bool:
    """Whether x is a DTensor; torch.distributed.tensor is not imported to find out."""
    return type(x) not in _PLAIN and hasattr(x, "_local_tensor") and hasattr(x, "placements")


def is_shard(placement: Any) -> bool:
    """Whether a placement cuts an axis: Shard, or the strided one of FSDP2 over tensor parallelism, which does not say so."""
    return placement.is_shard() or hasattr(placement, "split_factor")


def local(x: Tensor) -> Tensor:
    """The part of a DTensor on this rank, any other tensor itself."""
    if not is_dtensor(x):
        return x
    inner = x._local_tensor
    return inner.wait() if type(inner).__name__ == "AsyncCollectiveTensor" else inner


def like_parameter(x: Tensor, param: Tensor) -> Tensor:
    """A local tensor as a state of param: itself, or a DTensor of param's placements."""
    if not is_dtensor(param):
        return x
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def shape_of_states(param: Tensor, scheme: str) -> tuple[tuple[int, ...] | None, str]:
    """The shape in which the states of a parameter are quantized, or None and one sentence why they stay float32.

    >>> shape_of_states(torch.zeros(10), "dyn8/1x256@udyn8/1x256")
    (None, 'wants at least 4096 elements, got 10')
    """
    formats = [Format.parse(spelling) for spelling in scheme.split("@")]
    held = local(param)
    if all(fmt.is_identity for fmt in formats):
        return tuple(held.shape), ""
    if not param.is_floating_point():
        return None, f"wants floats, got {param.dtype}"
    if param.numel() < SMALLEST:
        return None, f"wants at least {SMALLEST} elements, got {param.numel()}"
    if reason := _why_not_rows(param, formats):
        flat = all(fmt.is_identity or fmt.block.startswith("1x") for fmt in formats) and not is_dtensor(param)
        sizes = [int(fmt.block[2:]) for fmt in formats if not fmt.is_identity] if flat else []
        if not flat or param.numel() % math.lcm(*sizes):
            return None, reason
        return (param.numel(),), ""
    return tuple(held.shape), ""


def _why_not_rows(param: Tensor, formats: Sequence[Format]) -> str:
    """ "" or why the blocks do not divide the parameter, on one of the ranks at least."""
    shape = list(param.shape)
    if is_dtensor(param):
        for placement, size in zip(param.placements, param.device_mesh.shape, strict=True):
            if is_shard(placement):
                dim = placement.dim
                if shape[dim] % size and dim >= len(shape) - 1:
                    return f"wants {size} equal shards of the last axis, got {shape[dim]}"
                shape[dim] = -(-shape[dim] // size)
    try:
        for fmt in formats:
            if not fmt.is_identity:
                fmt.scale_shape(tuple(shape))
    except MisfitError as error:
        return str(error)
    return ""


def zeros(param: Tensor, fmt: Format | None, shape: tuple[int, ...]) -> Tensor:
    """A state of zeros for the local part of a parameter; fmt None: float32."""
    held = local(param)
    if fmt is None or fmt.is_identity:
        dtype = torch.float32 if fmt is None else fmt.element.native
        return torch.zeros(held.shape, dtype=dtype, device=held.device)
    if not fmt.block.startswith("1x") or fmt.nested is not None or fmt.zero_point:
        return quantized(torch.zeros(held.shape, device=held.device), fmt, shape)
    one = QTensor.from_parts(quantize(torch.zeros(int(fmt.block[2:])), fmt), str(fmt), dtype=torch.float32).packed
    packed = {}
    for name, (size, dtype) in tensor_shapes(fmt, shape).items():
        filled = torch.empty(size, dtype=dtype, device=held.device)
        if dtype.itemsize == 1:
            filled.view(torch.uint8).fill_(int(one[name].view(torch.uint8).flatten()[0]))
        else:
            filled.fill_(one[name].flatten()[0].item())
        packed[name] = filled
    return shown(packed, fmt, shape, tuple(held.shape))


def quantized(x: Tensor, fmt: Format, shape: tuple[int, ...]) -> QTensor:
    """A state in `fmt` from floats, quantized in `shape` and shown in x's own."""
    flat = QTensor.from_parts(quantize(x.contiguous().view(shape), fmt), str(fmt), dtype=torch.float32)
    return shown(flat.packed, fmt, shape, tuple(x.shape))


def shown(packed: Packed, fmt: Format, shape: tuple[int, ...], as_shape: tuple[int, ...]) -> QTensor:
    """Packed tensors of a state quantized in `shape`, as a QTensor of another shape of as many elements."""
    from ..layouts import Spec

    return QTensor(packed, Spec(scheme=str(fmt), layout="plain", shape=shape), dtype=torch.float32, shape=as_shape)


def packed_of(state: Tensor) -> Packed:
    """The plain tensors of a state on this rank."""
    held = local(state)
    return held.packed if isinstance(held, QTensor) else {"qdata": held}


def is_kept_as(state: Tensor, fmt: Format | None, shape: tuple[int, ...]) -> bool:
    """Whether a state is in a format (None: float32), quantized in this shape."""
    held = local(state)
    if fmt is None or fmt.is_identity:
        return not isinstance(held, QTensor) and held.dtype == (torch.float32 if fmt is None else fmt.element.native)
    return isinstance(held, QTensor) and str(held.format) == str(fmt) and held.spec.shape == tuple(shape)


def floats(state: Tensor) -> Tensor:
    """The float32 values of a state on this rank, in its shape."""
    held = local(state)
    return held.dequantize(torch.float32) if isinstance(held, QTensor) else held.to(torch.float32)
