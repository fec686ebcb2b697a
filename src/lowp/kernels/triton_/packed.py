"""What a packed weight brings to the launch of a Triton kernel, and registering its operator.

What a weight brings does not change from call to call, so its kernels are known by what they depend on (`launch.py`). Sizes that
do change (the tokens) are marked `do_not_specialize` in the kernel.

Triton has no names for some of torch's dtypes, and on older GPUs no float8: such tensors are handed over as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from ...layouts.base import Packed
from . import interpreted
from .launch import launch

_PARTS = ("qdata", "scale", "zero_point", "scale_scale", "scale_zero_point")


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


def launch_packed(
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
        kernel: a jitted function whose arguments are the tensors, the sizes, the constants and EARLY, in this order. Its first
            tensor is qdata, loaded in units of constants["F"].unit bits where there is an F.
        grid: one or two axes. key: all that the compiled kernel depends on, but for the device and where the tensors lie.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    words = "F" in constants and constants["F"].unit == 32
    if words and tensors[0] is not None and tensors[0].data_ptr() & 3:  # a view that starts inside a word
        tensors = (tensors[0].clone(), *tensors[1:])
    found = (id(kernel), key, device, *(2 if tensor is None else tensor.data_ptr() & 15 == 0 for tensor in tensors))

    def first() -> tuple[Any, ...]:
        loaded = [_loadable(tensor) for tensor in tensors]
        if words:
            loaded[0] = loaded[0].view(torch.uint8).view(torch.int32)
        return (*loaded, *sizes)

    across, along = (*grid, 1)[:2]
    launch(
        kernel, found, (across, along, 1), (*tensors, *sizes), lambda: tuple(constants.values()), device, warps, stages,
        fusion=True, first=first,
    )  # fmt: skip


def _loadable(tensor: Tensor | None) -> Any:
    if tensor is None or not tensor.dtype.is_floating_point or tensor.element_size() > 1:
        return tensor
    return tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


KERNELS = ()
