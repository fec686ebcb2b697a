"""Launching a Triton kernel with little work for the host, and registering its operator.

Triton looks at every argument of every launch: is a pointer a multiple of 16, is a size 1? What a weight brings does not change
from call to call, so a compiled kernel is kept here by what it depends on, and started without that look. Sizes that do change
(the tokens) are marked `do_not_specialize` in the kernel.

Triton has no names for some of torch's dtypes, and on older GPUs no float8: such tensors are handed over as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...layouts.base import Packed
from . import interpreted

_PARTS = ("qdata", "scale", "zero_point", "scale_scale", "scale_zero_point")
_COMPILED: dict[Hashable, Any] = {}


def parts_of(packed: Packed) -> tuple[Tensor | None, ...]:
    """The tensors of a weight in the order of the operators' schemas: contiguous."""
    tensors = [packed.get(name) for name in _PARTS]
    for i, tensor in enumerate(tensors):
        if tensor is not None and not tensor.is_contiguous():
            tensors[i] = tensor.contiguous()
    return tuple(tensors)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel works in: `dtype`, but float32 for bfloat16 in the interpreter, whose NumPy has no such numbers."""
    return torch.float32 if dtype is torch.bfloat16 and interpreted() else dtype


def register(
    library: torch.library.Library, name: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Register an operator for CUDA, and for the CPU where the interpreter runs it."""
    library.impl(name, run, "CUDA")
    if interpreted():
        library.impl(name, run, "CPU")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    constants: dict[str, Any],
    *,
    key: Hashable,
    warps: int,
    stages: int,
) -> None:
    """Start a kernel.

    Args:
        kernel: a jitted function whose arguments are the tensors, the sizes and the constants, in this order. Its first tensor
            is qdata, loaded in units of constants["F"].unit bits where there is an F.
        grid: one or two axes. key: all that the compiled kernel depends on, but for the device and where the tensors lie.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, sizes, constants, key=key, warps=warps, stages=stages)
    words = "F" in constants and constants["F"].unit == 32
    if words and tensors[0] is not None and tensors[0].data_ptr() & 3:  # a view that starts inside a word
        tensors = (tensors[0].clone(), *tensors[1:])
    grid = (*grid, 1, 1)[:3]
    found = (id(kernel), key, device, *(2 if tensor is None else tensor.data_ptr() & 15 == 0 for tensor in tensors))
    compiled = _COMPILED.get(found)
    if compiled is not None:
        compiled[grid](*tensors, *sizes, *constants.values())
        return None
    loaded = [_loadable(tensor) for tensor in tensors]
    if words:
        loaded[0] = loaded[0].view(torch.uint8).view(torch.int32)
    compiled = kernel[grid](*loaded, *sizes, **constants, num_warps=warps, num_stages=stages)
    if not interpreted():
        _COMPILED[found] = compiled
    return None


def _loadable(tensor: Tensor | None) -> Any:
    if tensor is None or not tensor.dtype.is_floating_point or tensor.element_size() > 1:
        return tensor
    return tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


KERNELS = ()
