"""Time every candidate of a kernel on a case, and keep the fastest: the work of `lowp tune`.

    default    the kernel with the rule that it has anyway
    candidate  the same kernel with a configuration forced on it (`lowp.ops.tuned.forced`); it must be right first, as in `bench`

A candidate is kept where it is at least 2 % faster than the default: less is noise, and a rule that needs no file is worth more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..numerics import Scheme
from ..ops import Case, Kernel, tuned
from ..ops.registry import device_capability, explain
from .bench import Subject, calls, error_of, subject_of
from .clock import lost, median

_WORTH = 0.98  # of the default's time


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found for one kernel and case.

    Args:
        kernel, scheme, shape (N, K), batch: the case. tried: how many candidates. wrong: those that were wrong or raised, why.
        default_us: the kernel by its own rule. us, config: the fastest candidate, where it is worth it; else the default, None.
        why_not: why nothing was tried, "" where something was.
    """

    kernel: str
    scheme: str
    shape: tuple[int, int]
    batch: int
    tried: int = 0
    wrong: tuple[str, ...] = ()
    default_us: float | None = None
    us: float | None = None
    config: dict[str, Any] | None = None
    why_not: str = ""

    def entry(self, dtype: torch.dtype) -> tuple[tuple[str, tuned.Key], dict[str, Any] | None]:
        """What `tuned.store` keeps."""
        return (self.kernel, tuned.key_of(self.scheme, dtype, self.shape, self.batch)), self.config


@torch.no_grad()
def tune(
    scheme: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    op: str = "linear",
) -> Iterator[Tuned]:
    """Every kernel that can run a case and is no fallback, on each batch; those without candidates say so once."""
    spelled = str(Scheme.parse(scheme))
    for verdict in explain(op, spelled, device=device, dtype=dtype, shape=shape):
        kernel = verdict.kernel
        if verdict.why_not or kernel.fallback:
            continue
        if kernel.candidates is None:
            yield Tuned(kernel=kernel.name, scheme=spelled, shape=shape, batch=0, why_not="it declares no candidates")
            continue
        case = _case(op, spelled, shape, kernel, device, dtype)
        subject = subject_of(kernel, spelled, shape, max(batches), device=device, dtype=dtype)
        for batch in batches:
            yield _tuned(subject, case, batch, kernel.candidates(case, batch))
            if lost(device):
                return


def _case(op: str, scheme: str, shape: tuple[int, int], kernel: Kernel, device: str, dtype: torch.dtype) -> Case:
    where = torch.device(device)
    return Case(
        op=op, scheme=scheme, layout=kernel.layout or "plain", device=where.type, shape=shape,
        sm=device_capability(where.type, where.index), dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def _tuned(subject: Subject, case: Case, batch: int, candidates: Sequence[dict[str, Any]]) -> Tuned:
    made = dict(kernel=subject.kernel.name, scheme=case.scheme, shape=(case.shape[0], case.shape[1]), batch=batch)
    default, why = _time(subject, batch, None)
    found: list[tuple[float, dict[str, Any]]] = []
    wrong = [f"the default: {why}"] if why else []
    for config in candidates:
        us, why = _time(subject, batch, config)
        if us is None:
            wrong.append(f"{config}: {why}")
        else:
            found.append((us, config))
    us, config = min(found, key=lambda one: one[0], default=(None, None))
    if default is not None and (us is None or us > _WORTH * default):
        us, config = default, None
    return Tuned(tried=len(candidates), wrong=tuple(wrong), default_us=default, us=us, config=config, **made)  # type: ignore[arg-type]


def _time(subject: Subject, batch: int, config: dict[str, Any] | None) -> tuple[float | None, str]:
    """Microseconds with a configuration, or None and why not."""
    try:
        with tuned.forced(subject.kernel.name, config):
            error, most = error_of(subject, batch), subject.q.format.tolerance(subject.dtype)
            if not error <= most:
                return None, f"wants an error of at most {most:.1e}, got {error:.1e}"
            return median(calls(subject, batch), str(subject.x.device)).us, ""
    except Exception as error:  # a configuration that does not compile or does not fit is one that is not kept
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
