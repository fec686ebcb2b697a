"""How a Triton kernel is launched: compiled by Triton once, started from here every time after.

Triton's own launch looks at every argument on every call (type, alignment, whether it is 1), for about 10 us. A caller here
names with a key all that its kernel was specialized for, so that the next call goes to the compiled kernel at once. The key
must hold what Triton would look at: dtypes, which pointers are multiples of 16, which arguments are None, the device. Integers
are either multiples of 16 by contract, or listed in `do_not_specialize`, or held by the key as Triton sees them.

From sm90 on a kernel is launched while the one before still runs (CUDA C++ Programming Guide, "programmatic dependent launch"):
its launch, and what it does before `begin`, cost no time of their own. Before `begin`, nothing may be written, and nothing read
that another kernel wrote. Every kernel has the constant EARLY, its last, which says so.

Under TRITON_INTERPRET=1 nothing is compiled, and tensors may lie on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...ops.operator import define, plain
from . import interpreted

__all__ = ["aligned", "begin", "capturing", "define", "launch", "plain"]
KERNELS = ()

_COMPILED: dict[Any, Any] = {}


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next kernel be launched, and wait until what the one before wrote can be read."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@functools.cache
def _early(device: torch.device) -> bool:
    return not interpreted() and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


def launch(
    kernel: Any, key: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: Callable[[], tuple[Any, ...]],
    device: torch.device, warps: int, stages: int = 1, fusion: bool = False,
    first: Callable[[], tuple[Any, ...]] | None = None, registers: int = 0,
) -> None:  # fmt: skip
    """Start `kernel` with arguments and, behind them, its constants, which are asked for once for each key, and EARLY.

    first: the arguments as Triton is shown them, once for each key, where it has no name for a dtype of `args`.
    fusion: the compiler may contract a product and a sum to one instruction that the kernel's text does not ask for; never where
    bytes are compared exactly. registers: the most that a thread may take, so that more programs share a multiprocessor; 0 leaves
    it to the compiler."""
    found = _COMPILED.get(key)
    if found is None:
        _first(kernel, key, grid, first() if first else args, constants(), device, warps, stages, fusion, registers)
        return
    compiled, constant = found
    if device.index == torch._C._cuda_getDevice():
        compiled[grid](*args, *constant, stream=torch._C._cuda_getCurrentRawStream(device.index))
    else:
        with torch.cuda.device(device):
            compiled[grid](*args, *constant, stream=torch._C._cuda_getCurrentRawStream(device.index))


def _first(
    kernel: Any, key: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: tuple[Any, ...],
    device: torch.device, warps: int, stages: int, fusion: bool, registers: int,
) -> None:  # fmt: skip
    early = _early(device)
    constants = (*constants, early)
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fusion)
    if registers and torch.version.cuda is not None:
        options["maxnreg"] = registers
    if early:  # an option of CUDA's backend alone
        options["launch_pdl"] = True
    if interpreted():
        kernel[grid](*args, *constants, **options)
        return
    with torch.cuda.device(device):
        _COMPILED[key] = kernel[grid](*args, *constants, **options), constants


def capturing(device: torch.device) -> bool:
    """Whether what is launched goes into a CUDA graph, which will run it again with the very same arguments."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def aligned(x: Tensor) -> bool:
    """Whether it starts at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0
