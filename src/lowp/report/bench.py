"""How fast a kernel is: its median time beside torch's float op, and never before its result is right.

    relative error to the reference (float32) <= the format's tolerance      else no time is given
    time     median of repeated calls, on tensors that stay where they are (a small weight stays in the cache)
    ratio    time / time of torch's own op with a bf16 weight, and with an fp32 weight, measured in the same run

Activations and results have the same dtype for the kernel and for the reference; torch's two float ops get theirs. The batch
is M, the number of tokens: 1 is decoding, large is prefill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError, SpellingError
from ..numerics import Scheme
from ..numerics.compare import relative_error
from ..ops import Kernel, kernels_of
from ..ops.embedding import reference as embedding_reference
from ..ops.linear import reference as linear_reference
from ..ops.matmul import reference as matmul_reference
from ..ops.registry import explain
from ..tensor import QTensor
from .results import plain, row

OPS = ("linear", "matmul", "embedding")
_ANY_SCHEME = ("int8/row", "int4/1x128*bf16", "e4m3/row")  # for a kernel that takes all formats and names no case
_SECONDS = 0.2  # how long each median is taken over


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One kernel on one case.

    Args:
        op, scheme, kernel, layout, shape (N, K), batch, dtype, device: the case.
        error, tolerance: of the result against the reference. us: median microseconds, None where the result is wrong.
        bf16_us, fp32_us: torch's own op on the same shape, None where the result is wrong.
    """

    op: str
    scheme: str
    kernel: str
    layout: str
    shape: tuple[int, int]
    batch: int
    dtype: str
    device: str
    error: float
    tolerance: float
    us: float | None = None
    bf16_us: float | None = None
    fp32_us: float | None = None

    @property
    def right(self) -> bool:
        """The result is within the format's tolerance; NaN is not."""
        return self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values: dict[str, Any] = plain(dataclasses.asdict(self))
        return values | {"right": self.right}

    def to_row(self) -> dict[str, Any]:
        """A row of results, against bf16.

        Raises:
            KernelError: the result is wrong: such a time is not reported.
        """
        if self.us is None or self.bf16_us is None:
            raise KernelError(
                f"{self.kernel} is wrong on {self.scheme} {self.shape}, batch {self.batch}: no row for it."
            )
        more = dict(scheme=self.scheme, kernel=self.kernel, layout=self.layout, shape="x".join(map(str, self.shape)))
        more |= dict(
            batch=self.batch, dtype=self.dtype, fp32_us=round(self.fp32_us or 0.0, 2), error=f"{self.error:.2e}"
        )
        return row(self.op, self.us, "us", self.bf16_us, device=self.device, **more)


def bench(
    op: str,
    scheme: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    every: bool = False,
) -> Iterator[Timing]:
    """Time the kernel that is picked for a case, or with `every` each that can run it.

    Raises:
        SpellingError: an op that there is no benchmark for. KernelError: nothing can run it.
    """
    if op not in OPS:
        raise SpellingError.of("op", op, OPS)
    spelled = str(Scheme.parse(scheme))
    verdicts = explain(op, spelled, device=device, dtype=dtype, shape=shape)
    kernels = [v.kernel for v in verdicts if (v.chosen or every) and not v.why_not]
    if not kernels:
        reasons = "; ".join(f"{v.kernel.name}: {v.why_not}" for v in verdicts)
        raise KernelError(f"a kernel is wanted for {op} {spelled} {shape} on {device}, got none ({reasons}).")
    for kernel in kernels:
        yield from bench_kernel(kernel, spelled, shape, batches, device=device, dtype=dtype)


def bench_kernel(
    kernel: Kernel, scheme: str, shape: tuple[int, int], batches: Sequence[int], *, device: str, dtype: torch.dtype
) -> Iterator[Timing]:
    """One kernel over batch sizes; the caller knows that it can run the case."""
    generator = torch.Generator(device).manual_seed(0)
    w_NK = 0.02 * torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    quantized = QTensor.quantize(w_NK.to(dtype), scheme).to_layout(kernel.layout or "plain")
    for batch in batches:
        case = _case(kernel, quantized, w_NK, batch, dtype, generator)
        error = relative_error(case.reference().float(), case.kernel().float())
        tolerance = quantized.format.tolerance(dtype)
        right = error <= tolerance
        yield Timing(
            op=kernel.op,
            scheme=scheme,
            kernel=kernel.name,
            layout=quantized.spec.layout,
            shape=shape,
            batch=batch,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            error=error,
            tolerance=tolerance,
            us=median_us(case.kernel) if right else None,
            bf16_us=median_us(case.bf16) if right else None,
            fp32_us=median_us(case.fp32) if right else None,
        )


def runnable(op: str, *, device: str, dtype: torch.dtype, shape: tuple[int, int]) -> Iterator[tuple[Kernel, str, str]]:
    """Every kernel of an op but the fallbacks, with each scheme it is meant for, and "" or why it cannot run that here."""
    for kernel in kernels_of(op):
        for scheme in kernel.cases or (() if kernel.fallback else _ANY_SCHEME):
            verdicts = explain(op, scheme, device=device, dtype=dtype, shape=shape)
            yield kernel, scheme, next(v.why_not for v in verdicts if v.kernel is kernel)


@torch.no_grad()
def median_us(function: Callable[[], Tensor]) -> float:
    """The median time of a call in microseconds, with torch's own number of threads, the device waited for."""
    from torch.utils.benchmark import Timer

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return 1e6 * timer.blocked_autorange(min_run_time=_SECONDS).median


# -- what is called ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Case:
    kernel: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    bf16: Callable[[], Tensor]
    fp32: Callable[[], Tensor]


def _case(
    kernel: Kernel, q: QTensor, w_NK: Tensor, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> _Case:
    make = {"linear": _linear, "matmul": _matmul, "embedding": _embedding}[kernel.op]
    return make(kernel, q, w_NK, batch, dtype, generator)


def _linear(
    kernel: Kernel, q: QTensor, w_NK: Tensor, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> _Case:
    x_MK = torch.randn(batch, w_NK.shape[1], generator=generator, device=w_NK.device).to(dtype)
    x16, w16, x32 = x_MK.bfloat16(), w_NK.bfloat16(), x_MK.float()
    return _Case(
        kernel=lambda: kernel.run(x_MK, q.packed, q.spec, None),
        reference=lambda: linear_reference(x_MK, q.packed, q.spec),
        bf16=lambda: F.linear(x16, w16),
        fp32=lambda: F.linear(x32, w_NK),
    )


def _matmul(
    kernel: Kernel, q: QTensor, w_NK: Tensor, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> _Case:
    x_MN = torch.randn(batch, w_NK.shape[0], generator=generator, device=w_NK.device).to(dtype)
    x16, w16, x32 = x_MN.bfloat16(), w_NK.bfloat16(), x_MN.float()
    return _Case(
        kernel=lambda: kernel.run(x_MN, q.packed, q.spec, False),
        reference=lambda: matmul_reference(x_MN, q.packed, q.spec),
        bf16=lambda: x16 @ w16,
        fp32=lambda: x32 @ w_NK,
    )


def _embedding(
    kernel: Kernel, q: QTensor, w_NK: Tensor, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> _Case:
    ids = torch.randint(0, w_NK.shape[0], (batch,), generator=generator, device=w_NK.device)
    w16 = w_NK.bfloat16()
    return _Case(
        kernel=lambda: kernel.run(ids, q.packed, q.spec, dtype),
        reference=lambda: embedding_reference(ids, q.packed, q.spec, dtype),
        bf16=lambda: F.embedding(ids, w16),
        fp32=lambda: F.embedding(ids, w_NK),
    )
