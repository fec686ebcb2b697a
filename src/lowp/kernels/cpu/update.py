"""Optimizer steps on a CPU in C++: one pass over memory, blocks shared among torch's threads.

The text is native/update.h and update_loops.h. States are in a map of values of 8 or 4 bits or in float32, parameters and
gradients in float32 or bf16. Codes and scales are the bytes of the reference; adam's parameter too, but for MKL's square root.
"""

from __future__ import annotations

import ctypes
import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ...numerics import Format
from ...ops.registry import Case, Kernel
from ...ops.update import ELEMENTWISE, Slot, Step, coefficients_of, formats_of, why_not_flat
from .library import PATH, missing

_LARGEST_BLOCK = 2048  # kLargestBlock
_CHUNK = 1024  # elements of a block where no state has blocks


class _Moment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "values", "words")),
        *((name, ctypes.c_int32) for name in ("bits", "shift", "base", "top", "first")),
    ]


class _Update(ctypes.Structure):
    _fields_ = [
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("moments", _Moment * 3),
        ("count", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("rule", ctypes.c_int32),
        *(
            (n, ctypes.c_int32)
            for n in ("param_bf16", "grad_bf16", "amsgrad", "scaled", "maximize", "coupled", "nesterov")
        ),
        *(
            (n, ctypes.c_float)
            for n in ("inverse_scale", "decay", "rate", "root", "first", "beta1", "keep1", "beta2", "keep2")
        ),
        ("eps", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
    ]


@functools.cache
def _function() -> Any:
    """The entry of the library; None where that was built before it was written."""
    found = getattr(ctypes.CDLL(str(PATH)), "lowp_cpu_update", None)
    if found is None:
        return None
    found.argtypes, found.restype = [ctypes.POINTER(_Update)], ctypes.c_int32
    return found


@functools.cache
def _tables(name: str) -> tuple[Tensor, Tensor]:
    """The values of a map by code and the words of its buckets."""
    element = Format.parse(name).element
    words = torch.tensor(element.buckets.words, dtype=torch.int32)  # type: ignore[union-attr]
    return element.table(torch.device("cpu")).contiguous(), words


def _moment(packed: dict[str, Tensor], fmt: Format) -> _Moment:
    codes = packed["qdata"].data_ptr()
    if fmt.is_identity:
        return _Moment(codes=codes)
    values, words = _tables(str(fmt))
    b = fmt.element.buckets
    return _Moment(
        codes=codes, scales=packed["scale"].data_ptr(), values=values.data_ptr(), words=words.data_ptr(), bits=fmt.element.bits,
        shift=b.shift, base=b.base, top=b.top, first=b.first,  # type: ignore[union-attr]
    )  # fmt: skip


def _run(rule: int, step: Step) -> None:
    if step.found_inf is not None and bool(step.found_inf):
        return
    s, c = step.settings, coefficients_of(step.numbers)
    scaled = step.grad_scale is not None
    inverse = float(step.grad_scale.to(torch.float32).reciprocal()) if scaled else 1.0  # type: ignore[union-attr]
    for slot, grad in zip(step.slots, step.grads, strict=True):
        one = _Update(
            param=slot.param.data_ptr(), grad=grad.data_ptr(), count=slot.param.numel(), block=_block(slot), rule=rule,
            param_bf16=slot.param.dtype == torch.bfloat16, grad_bf16=grad.dtype == torch.bfloat16, amsgrad=s.amsgrad,
            scaled=scaled, maximize=s.maximize, coupled=s.weight_decay != 0 and not s.decoupled, nesterov=s.nesterov,
            inverse_scale=inverse, decay=float(c.decay), rate=float(c.rate), root=float(c.root), first=float(c.first),
            beta1=s.beta1, keep1=1 - s.beta1,
            beta2=s.beta2, keep2=1 - s.beta2, eps=s.eps, weight_decay=s.weight_decay,
        )  # fmt: skip
        for i, (packed, fmt) in enumerate(zip(slot.states, slot.formats, strict=True)):
            one.moments[i] = _moment(packed, fmt)
        if one.count and _function()(ctypes.byref(one)):
            raise KernelError(f"lowp's C++ optimizer could not run a block of {one.block}.")


def _block(slot: Slot) -> int:
    return max((int(fmt.block[2:]) for fmt in slot.formats if not fmt.is_identity), default=_CHUNK)


def _why_not(case: Case) -> str:
    if case.device != "cpu":
        return f"wants cpu, got {case.device}"
    if reason := missing():
        return reason
    if _function() is None:
        return "wants lowp's C++ library as it is now, got an older build: install lowp again"
    for dtype in (case.dtype, *case.extras[:1]):
        if dtype not in ("float32", "bfloat16"):
            return f"wants parameters and gradients of float32 or bfloat16, got {dtype}"
    if "noise" in case.extras:
        return "wants rounding to nearest, got noise"
    formats = formats_of(case.scheme)[:2]
    for fmt in formats:
        if reason := why_not_flat(fmt):
            return reason
        if fmt.is_identity:
            if fmt.element.native != torch.float32:
                return f"wants maps of values or fp32, got {fmt}"
        elif fmt.element.buckets is None or fmt.element.largest != 1.0 or fmt.scale != "fp32" or fmt.rule != "absmax":
            return f"wants a map in rising order up to 1 under an fp32 scale by absmax, got {fmt}"
    sizes = {int(fmt.block[2:]) for fmt in formats if not fmt.is_identity}
    if len(sizes) > 1 or any(size % 2 or size > _LARGEST_BLOCK for size in sizes):
        return f"wants even blocks of one size up to {_LARGEST_BLOCK}, got {' and '.join(map(str, sorted(sizes)))}"
    return ""


def _how(case: Case) -> str:
    names = dict.fromkeys(fmt.element.name for fmt in formats_of(case.scheme)[: 2 if case.op == "adam" else 1])
    return f"one pass in C++, states in {' and '.join(names)}, updated in fp32"


_CASES = ("dyn8/1x256@udyn8/1x256", "dyn4/1x128@ulin4/1x128", "fp32")

KERNELS = tuple(
    Kernel(
        op=rule, name="native", rank=50, layout="", why_not=_why_not, run=partial(_run, i), how=_how, cases=_CASES,
        about="one pass over memory in C++, on all of torch's threads",
    )
    for i, rule in enumerate(ELEMENTWISE)
)  # fmt: skip
