"""The table of kernels: what can run, what runs, and why.

A case is all that is fixed when a graph is traced: op, formats, layout, device, dtype, N and K. Each kernel answers a case
with "" or with one sentence why it cannot run it; the first that can, in order of rank, is picked. What depends on the batch
size M is decided inside the kernel's own file.

    rank   0 ..  99   kernels written for the case
         100 .. 899   kernels that come with torch
         900          dequantize, then torch's float op        ("fallback": correct everywhere, never the fast way)
        1000          the reference, in float32                ("fallback")

Kernels are found by listing `lowp/kernels/*/`. An ImportError there (no Triton, no compiled library) becomes the kernel's
reason, nowhere else.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, SpellingError
from ..layouts import LAYOUTS, Spec
from ..layouts.base import Packed, Schemed
from ..numerics import Scheme


@dataclass(frozen=True, kw_only=True)
class Case(Schemed):
    """What a kernel may look at.

    Args:
        op: "linear", "matmul", "grouped", "embedding", "cast" ...
        scheme: spelling of the weight's format and, after "@", the activation's.
        layout: name of the weight's layout.
        device: "cpu", "cuda" ...; sm: compute capability times ten, 90 for Hopper, 0 elsewhere.
        dtype: of the activation and the result, such as "bfloat16".
        shape: (..., N, K) of the quantized weight.
        extras: names of the optional tensors that are there (act_pre_scale, act_scale).
    """

    op: str
    scheme: str
    layout: str = "plain"
    device: str = "cpu"
    sm: int = 0
    dtype: str = "bfloat16"
    shape: tuple[int, ...] = (4096, 4096)
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to run an op.

    Args:
        op: the op's name. name: the kernel's own.
        rank: lower is tried first.
        layout: the layout it reads; "" for any (it unpacks).
        why_not: case -> "" or one sentence: what it wants and what it got.
        run: the op's arguments -> its result.
        fallback: True where it is correct but never the fast way; strict mode refuses it.
        cases: schemes that it is meant for: cases of its tests and rows of the benchmark.
        about: one line for the docs.
        how: a case that it can run -> one short sentence of what the device multiplies and what is emulated (see `how.py`).
        candidates: case and M -> configurations to time, each a dict of plain values, for `lowp tune`; None where it has no knob.
            The kernel asks `tuned.choice(name, tuned.key_of(...))` for the one that was found, and has a rule where that is None.
    """

    op: str
    name: str
    rank: int
    layout: str
    why_not: Callable[[Case], str]
    run: Callable[..., Any]
    fallback: bool = False
    cases: tuple[str, ...] = ()
    about: str = ""
    how: Callable[[Case], str] | None = None
    candidates: Callable[[Case, int], list[dict[str, Any]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One row of `explain`: a kernel, "" or why it cannot run, and how it would compute the case ("" where it cannot)."""

    kernel: Kernel
    why_not: str
    chosen: bool = False
    how: str = ""


@functools.cache
def kernels_of(op: str) -> tuple[Kernel, ...]:
    """All kernels of an op in order of rank, those that could not be imported included (with their reason)."""
    found = [kernel for module in _kernel_modules() for kernel in module if kernel.op == op]
    return tuple(sorted(found, key=lambda kernel: (kernel.rank, kernel.name)))


@functools.cache
def all_ops() -> tuple[str, ...]:
    """The names of all ops: each has a fallback that runs every case.

    >>> all_ops()[0]
    'linear'
    """
    return tuple(dict.fromkeys(kernel.op for module in _kernel_modules() for kernel in module if kernel.fallback))


@functools.cache
def _kernel_modules() -> tuple[tuple[Kernel, ...], ...]:
    from .. import kernels

    modules = []
    for folder in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if not folder.ispkg:
            continue  # what kernels share: nvrtc.py
        package = importlib.import_module(folder.name)
        for info in pkgutil.iter_modules(package.__path__, f"{folder.name}."):
            modules.append(_load(info.name))
    return tuple(modules)


def _load(name: str) -> tuple[Kernel, ...]:
    try:
        return tuple(getattr(importlib.import_module(name), "KERNELS", ()))  # a module may only help another
    except ImportError as error:
        reason = f"wants {error.name or 'a library'} to be importable: {error}"

        def refuse(*args: object, **kwargs: object) -> Tensor:
            raise KernelError(f"{name}: {reason}")

        return (
            Kernel(
                op="linear",
                name=name.rpartition(".")[2],
                rank=0,
                layout="plain",
                why_not=lambda case: reason,
                run=refuse,
            ),
        )


def case_of(op: str, x: Tensor, packed: Packed, spec: Spec) -> Case:
    """The case of an op called with these tensors."""
    device = x.device
    return Case(
        op=op,
        scheme=spec.scheme,
        layout=spec.layout,
        device=device.type,
        sm=device_capability(device.type, device.index),
        dtype=str(x.dtype if x.is_floating_point() else torch.float32).removeprefix("torch."),
        shape=spec.shape,
        extras=tuple(name for name in ("act_pre_scale", "act_scale") if name in packed),
    )


def picked(op: str, x: Tensor, packed: Packed, spec: Spec) -> Kernel:
    """`pick` for a call with these tensors: a look-up after the first call of its kind."""
    kernel = _picked(op, spec, x.device, x.dtype, tuple(packed))
    return pick(case_of(op, x, packed, spec)) if kernel is None or kernel.fallback else kernel


@functools.lru_cache(maxsize=65536)
def _picked(op: str, spec: Spec, device: torch.device, dtype: torch.dtype, names: tuple[str, ...]) -> Kernel | None:
    meta = torch.empty(0, dtype=dtype, device="meta")
    case = case_of(op, meta, dict.fromkeys(names, meta), spec)
    return _pick(dataclasses.replace(case, device=device.type, sm=device_capability(device.type, device.index)))


@functools.cache
def device_capability(device: str, index: int | None) -> int:
    """Compute capability times ten of a CUDA device (90 for Hopper), 0 elsewhere."""
    if device != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def device_of(name: str | torch.device) -> torch.device:
    """A device that this machine has.

    Raises:
        SpellingError: it is no device, or not here.

    >>> device_of("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpellingError.of("device", str(name), ["cpu", "cuda", "cuda:0"]) from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        found = f"{count} CUDA devices" if count else "no CUDA device"
        raise SpellingError(f"device {str(name)!r} is not here, found {found}: use cpu, or another machine.")
    return device


_STRICT: contextvars.ContextVar[bool] = contextvars.ContextVar("lowp_strict", default=False)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Inside this context a case that only a fallback can run is a KernelError that says why each fast kernel refused.

    >>> with strict():
    ...     pick(Case(op="linear", scheme="int8/row")).name
    'int8pack_cpu'
    """
    token = _STRICT.set(True)
    try:
        yield
    finally:
        _STRICT.reset(token)


def pick(case: Case, *, strict: bool = False) -> Kernel:
    """The kernel that runs a case.

    Raises:
        KernelError: none can, or in strict mode only a fallback can.
    """
    kernel = _pick(case)
    if kernel is None or (kernel.fallback and (strict or _STRICT.get())):
        reasons = (
            "; ".join(f"{v.kernel.name}: {v.why_not}" for v in verdicts(case) if v.why_not)
            or "no kernel is written for it"
        )
        wanted = "a fast kernel" if kernel else "a kernel"
        raise KernelError(
            f"strict mode wants {wanted} for {case.op} {case.scheme} {case.shape} on {case.device} "
            f"in layout {case.layout}, got none ({reasons}). Choose another scheme, or leave strict mode to run the fallback."
        )
    return kernel


@functools.lru_cache(maxsize=65536)
def _pick(case: Case) -> Kernel | None:
    return next((v.kernel for v in verdicts(case) if not v.why_not), None)


def verdicts(case: Case) -> list[Verdict]:
    """Every kernel of the op with its answer to this very case, in order of rank; the first that can run is chosen."""
    rows: list[Verdict] = []
    for kernel in kernels_of(case.op):
        reason = _layout_reason(kernel, case) or kernel.why_not(case)
        rows.append(Verdict(kernel=kernel, why_not=reason, chosen=not reason and not any(row.chosen for row in rows)))
    return rows


def _layout_reason(kernel: Kernel, case: Case) -> str:
    if not kernel.layout or kernel.layout == case.layout:
        return ""
    return f"wants the layout {kernel.layout}, got {case.layout}"


def explain(
    op: str,
    scheme: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, ...] = (4096, 4096),
) -> list[Verdict]:
    """Every kernel for a case, each asked in the layout that it wants: how it would compute it, or why it cannot.

    The first that can is chosen.

    >>> [verdict.kernel.name for verdict in explain("linear", "int4/1x128*bf16") if not verdict.why_not][-1]
    'reference'
    """
    target = torch.device(device)
    base = Case(
        op=op,
        scheme=str(Scheme.parse(scheme)),
        device=target.type,
        sm=device_capability(target.type, target.index),
        dtype=str(dtype).removeprefix("torch."),
        shape=tuple(shape),
    )
    rows: list[Verdict] = []
    for kernel in kernels_of(op):
        reason = why_not_from_plain(kernel, base)
        how = (
            kernel.how(dataclasses.replace(base, layout=kernel.layout or "plain")) if kernel.how and not reason else ""
        )
        chosen = not reason and not any(row.chosen for row in rows)
        rows.append(Verdict(kernel=kernel, why_not=reason, chosen=chosen, how=how))
    return rows


def why_not_from_plain(kernel: Kernel, case: Case) -> str:
    """As `kernel.why_not`, were the weight packed in the layout that the kernel wants."""
    name = kernel.layout or "plain"
    layout = LAYOUTS.get(name)
    if layout is None:
        return f"wants the layout {name}, which this installation lacks"
    if layout.device and layout.device != case.device:
        return f"wants a {layout.device} device, got {case.device}"
    return layout.why_not(case.weight, case.shape, case.device) or kernel.why_not(
        dataclasses.replace(case, layout=name)
    )


def best_layout(ops: tuple[str, ...], case: Case) -> tuple[str, tuple[Kernel, ...], str]:
    """The layout to pack a weight in, given the ops that will read it.

    Args:
        ops: "linear", or ("embedding", "linear") for a tied weight. case: with any layout; its `op` is not looked at.

    Returns:
        The layout's name, the kernel for each op, and a sentence why.
    """
    for layout in dict.fromkeys(kernel.layout or "plain" for op in ops for kernel in kernels_of(op)):
        chosen = [_first(op, dataclasses.replace(case, op=op, layout=layout)) for op in ops]
        if all(kernel is not None and not kernel.fallback for kernel in chosen):
            kernels = tuple(kernel for kernel in chosen if kernel is not None)
            return layout, kernels, ", ".join(f"{kernel.op} by {kernel.name}" for kernel in kernels)
    kernels = tuple(pick(dataclasses.replace(case, op=op, layout="plain")) for op in ops)
    return (
        "plain",
        kernels,
        ", ".join(f"{kernel.op} by {kernel.name}{' (fallback)' if kernel.fallback else ''}" for kernel in kernels),
    )


def _first(op: str, case: Case) -> Kernel | None:
    for kernel in kernels_of(op):
        if (kernel.layout or case.layout) == case.layout and not why_not_from_plain(kernel, case):
            return kernel
    return None
