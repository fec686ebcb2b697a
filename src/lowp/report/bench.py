"""How fast a kernel is: its median time beside torch's float op, and never before its result is right.

    relative error to the reference (float32) <= the format's tolerance      else no time is given
    ratio      time / time of torch's own op with a bf16 weight (on a CPU with an fp32 weight too), measured in the same run
    over_limit time / the least time that the device's bandwidth and its rate of products allow (`clock.py`, CUDA only)

The batch is M, the number of tokens: 1 is decoding, large is prefill. Activations and results have the same dtype for the kernel
and for the reference; torch's two float ops get theirs. Before a result is compared, memory that torch hands out uninitialised is
filled with NaN: every output must be finite, and 64 tokens spread over the batch (all of a small one) must match the reference,
which reads the same quantized weight, decoded to float32 once.

A kernel that raises is a row as well: it has `failed`, a sentence, and no time. The others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import KernelError, LowpError, SpellingError
from ..layouts import Spec
from ..layouts.base import Packed
from ..numerics import Scheme
from ..numerics.compare import relative_error
from ..ops import Kernel, kernels_of
from ..ops.embedding import reference as embedding_reference
from ..ops.linear import reference as linear_reference
from ..ops.linear import weight_values
from ..ops.matmul import reference as matmul_reference
from ..ops.registry import explain
from ..tensor import QTensor
from .clock import Limits, Time, lost, median, rotation
from .results import plain, row

OPS = ("linear", "matmul", "embedding")
_ANY_SCHEME = ("int8/row", "int4/1x128*bf16", "e4m3/row")  # for a kernel that takes all formats and names no case
_COMPARED = 64  # tokens of a large batch that are compared with the reference
Floats = dict[tuple[Any, ...], Time]  # what torch's own ops took, by (dtype, op, shape, batch)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One kernel on one case.

    Args:
        op, scheme, kernel, layout, shape (N, K), batch, dtype, device: the case.
        error, tolerance: of the result against the reference. us: median microseconds, None where the result is wrong.
        bf16_us, fp32_us: torch's own op on the same shape, None where the result is wrong (and fp32 on a GPU).
        limit_us: what the device's limits allow, None where they are not known.
        failed: why there is no result, "" where there is one. note: how it was timed, where that is not the usual way.
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
    limit_us: float | None = None
    failed: str = ""
    note: str = ""

    @property
    def right(self) -> bool:
        """The result is within the format's tolerance; NaN is not."""
        return not self.failed and self.error <= self.tolerance

    @property
    def speed(self) -> float | None:
        """How many times as fast as torch's bf16 op, None where there is no time."""
        return None if self.us is None or self.bf16_us is None else self.bf16_us / self.us

    @property
    def over_limit(self) -> float | None:
        """Time over the least time possible, None where one of them is not known."""
        return None if self.us is None or not self.limit_us else self.us / self.limit_us

    def why_wrong(self) -> str:
        """One sentence about a result that got no time."""
        case = f"{self.kernel or 'no kernel'} on {self.scheme} {self.shape}, batch {self.batch}"
        return f"{case}: {self.failed or f'wants an error of at most {self.tolerance:.1e}, got {self.error:.1e}'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values: dict[str, Any] = plain(dataclasses.asdict(self))
        return values | {"right": self.right, "speed": plain(self.speed), "over_limit": plain(self.over_limit)}

    def to_row(self) -> dict[str, Any]:
        """A row of results, against bf16.

        Raises:
            KernelError: the result is wrong: such a time is not reported.
        """
        if self.us is None or self.bf16_us is None:
            raise KernelError(f"no row for a wrong result. {self.why_wrong()}.")
        more: dict[str, Any] = dict(scheme=self.scheme, kernel=self.kernel, layout=self.layout)
        more |= dict(M=self.batch, N=self.shape[0], K=self.shape[1], dtype=self.dtype)
        more |= dict(limit_us=_short(self.limit_us), over_limit=_short(self.over_limit), error=f"{self.error:.2e}")
        return row(self.op, self.us, "us", self.bf16_us, device=self.device, **more)


def _short(value: float | None) -> float | str:
    return "" if value is None else float(f"{value:.4g}")


def sweep(
    op: str,
    schemes: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    every: bool = False,
    limits: Limits | None = None,
) -> Iterator[Timing]:
    """Every scheme on every shape and batch, torch's own op beside it.

    A scheme that nothing runs on a shape is a Timing with `failed`. Where a kernel breaks the CUDA context the sweep ends.
    """
    for shape in shapes:
        floats: Floats = {}
        for scheme in schemes:
            try:
                for one in bench(
                    op, scheme, shape, batches, device=device, dtype=dtype, every=every, floats=floats, limits=limits
                ):
                    yield one
                    if one.failed and lost(device):
                        return
            except SpellingError:
                raise
            except LowpError as error:
                yield from (_failure(op, scheme, shape, batch, device, dtype, error) for batch in batches)


def bench(
    op: str,
    scheme: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    every: bool = False,
    floats: Floats | None = None,
    limits: Limits | None = None,
) -> Iterator[Timing]:
    """Time the kernel that is picked for a case, or with `every` each that can run it.

    Args:
        floats: the times of torch's own ops that are known already; more are added. limits: of the device, for `limit_us`.

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
    known: Floats = {} if floats is None else floats
    for kernel in kernels:
        yield from bench_kernel(
            kernel, spelled, shape, batches, device=device, dtype=dtype, floats=known, limits=limits
        )


@torch.no_grad()
def bench_kernel(
    kernel: Kernel,
    scheme: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    floats: Floats | None = None,
    limits: Limits | None = None,
) -> Iterator[Timing]:
    """One kernel over batch sizes; the caller knows that it can run the case."""
    known: Floats = {} if floats is None else floats
    try:
        subject = subject_of(kernel, scheme, shape, max(batches), device=device, dtype=dtype)
    except Exception as error:  # whatever a layout raises costs its own rows alone
        yield from (_failure(kernel.op, scheme, shape, n, device, dtype, error, kernel.name) for n in batches)
        return
    for batch in batches:
        try:
            yield _timing(subject, batch, known, limits)
        except Exception as error:  # a kernel may raise anything: a compiler's error, an assertion, out of memory
            yield _failure(kernel.op, scheme, shape, batch, device, dtype, error, kernel.name)
            if lost(device):
                return


def runnable(op: str, *, device: str, dtype: torch.dtype, shape: tuple[int, int]) -> Iterator[tuple[Kernel, str, str]]:
    """Every kernel of an op but the fallbacks, with each scheme it is meant for, and "" or why it cannot run that here."""
    for kernel in kernels_of(op):
        for scheme in kernel.cases or (() if kernel.fallback else _ANY_SCHEME):
            verdicts = explain(op, scheme, device=device, dtype=dtype, shape=shape)
            yield kernel, scheme, next(v.why_not for v in verdicts if v.kernel is kernel)


def lines(found: Sequence[Timing]) -> dict[str, list[Timing]]:
    """The timings by scheme; by scheme and kernel where several kernels were timed on one case."""
    several = len({(one.scheme, one.shape, one.batch) for one in found}) < len(found)
    grouped: dict[str, list[Timing]] = {}
    for one in found:
        grouped.setdefault(f"{one.scheme}, {one.kernel}" if several else one.scheme, []).append(one)
    return grouped


def slowest(found: Sequence[Timing]) -> Timing | None:
    """The timing with the smallest speed over bf16, None where nothing has a time."""
    return min((one for one in found if one.speed is not None), key=lambda one: one.speed or 0.0, default=None)


# -- one case ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A kernel with a quantized weight to run on, and what is needed to judge it.

    Args:
        kernel, q: the kernel and the weight in its layout. copies: of the packed weight, the first is q's own.
        w_NK: the floats that were quantized, float32. decoded: the quantized weight's values, float32, as a packed tensor.
        x: inputs for the largest batch: tokens (batch, K or N), or ids (batch,) of an embedding.
    """

    kernel: Kernel
    q: QTensor
    copies: tuple[Packed, ...]
    w_NK: Tensor
    decoded: tuple[Packed, Spec]
    x: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and results."""
        return self.q.dtype


def subject_of(
    kernel: Kernel, scheme: str, shape: tuple[int, int], batch: int, *, device: str, dtype: torch.dtype
) -> Subject:
    """Random weights and inputs for a kernel, always the same ones."""
    generator = torch.Generator(device).manual_seed(0)
    w_NK = 0.02 * torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    q = QTensor.quantize(w_NK.to(dtype), scheme).to_layout(kernel.layout or "plain")
    if kernel.op == "embedding":
        x = torch.randint(0, shape[0], (batch,), generator=generator, device=device)
    else:
        columns = shape[1] if kernel.op == "linear" else shape[0]
        x = torch.randn(batch, columns, generator=generator, device=device).to(dtype)
    spec = Spec(scheme="fp32" if q.spec.act is None else f"fp32@{q.spec.act}", layout="plain", shape=q.spec.shape)
    rest = {name: tensor for name, tensor in q.packed.items() if name.startswith("act_")}
    decoded = {"qdata": weight_values(q.packed, q.spec, torch.float32)} | rest
    copies = [q.packed] + [q.map(torch.clone).packed for _ in range(rotation(q.packed_nbytes, device) - 1)]
    return Subject(kernel=kernel, q=q, copies=tuple(copies), w_NK=w_NK, decoded=(decoded, spec), x=x)


def calls(subject: Subject, batch: int) -> list[Callable[[], Tensor]]:
    """The kernel on a batch: a call for each copy of the weight."""
    run, spec, x = subject.kernel.run, subject.q.spec, subject.x[:batch]
    last = {"linear": None, "matmul": False, "embedding": subject.dtype}[subject.kernel.op]
    return [lambda packed=packed: run(x, packed, spec, last) for packed in subject.copies]  # type: ignore[misc]


def error_of(subject: Subject, batch: int) -> float:
    """The relative error of the kernel on a batch against the reference; NaN where any output is not finite."""
    with poisoned():
        y = calls(subject, batch)[0]()
    if not bool(y.isfinite().all()):
        return math.nan
    rows = torch.linspace(0, batch - 1, min(batch, _COMPARED), device=y.device).round().long()
    return relative_error(_expected(subject, batch, rows).float(), y[rows].float())


def _expected(subject: Subject, batch: int, rows: Tensor) -> Tensor:
    """Some rows of the reference's result; the whole batch is computed only where tokens share a scale."""
    x, (decoded, spec) = subject.x[:batch], subject.decoded
    if subject.kernel.op == "embedding":
        return embedding_reference(x[rows], decoded, spec, subject.dtype)
    if subject.kernel.op == "matmul":
        return matmul_reference(x[rows], decoded, spec)
    if _by_token(spec, tuple(x.shape)):
        return linear_reference(x[rows], decoded, spec)
    return linear_reference(x, decoded, spec)[rows]


def _by_token(spec: Spec, shape: tuple[int, ...]) -> bool:
    act = spec.act
    if act is None or act.is_identity:
        return True
    return act.nested is None and act.block != "tensor" and act.block_dims(shape)[0] == 1


def _timing(subject: Subject, batch: int, floats: Floats, limits: Limits | None) -> Timing:
    q, kernel, device = subject.q, subject.kernel, str(subject.x.device)
    made = Timing(
        op=kernel.op,
        scheme=q.spec.scheme,
        kernel=kernel.name,
        layout=q.spec.layout,
        shape=(subject.w_NK.shape[0], subject.w_NK.shape[1]),
        batch=batch,
        dtype=_name(q.dtype),
        device=device,
        error=error_of(subject, batch),
        tolerance=q.format.tolerance(q.dtype),
    )
    if not made.right:
        return made
    taken = median(calls(subject, batch), device)
    return dataclasses.replace(
        made,
        us=taken.us,
        note=taken.note,
        bf16_us=_float_time(subject, batch, torch.bfloat16, floats).us,
        fp32_us=_float_time(subject, batch, torch.float32, floats).us if subject.x.device.type == "cpu" else None,
        limit_us=None if limits is None else _limit_us(subject, batch, limits),
    )


def _float_time(subject: Subject, batch: int, dtype: torch.dtype, floats: Floats) -> Time:
    """The median time of torch's own op with a weight of that dtype: once for each shape and batch on a CPU; on a GPU anew beside
    each kernel, because its clock falls by a tenth as it gets warm."""
    if subject.x.device.type == "cuda":
        return median(_float_calls(subject, batch, dtype), str(subject.x.device))
    key = (dtype, subject.kernel.op, subject.w_NK.shape, batch)
    if key not in floats:
        floats[key] = median(_float_calls(subject, batch, dtype), str(subject.x.device))
    return floats[key]


def _float_calls(subject: Subject, batch: int, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    op, x, w_NK = subject.kernel.op, subject.x[:batch], subject.w_NK.to(dtype)
    run: Callable[[Tensor, Tensor], Tensor] = {"linear": F.linear, "matmul": torch.matmul, "embedding": F.embedding}[op]
    x = x if op == "embedding" else x.to(dtype)
    copies = rotation(w_NK.numel() * w_NK.element_size(), str(w_NK.device))
    return [lambda w=w: run(x, w) for w in (w_NK, *(w_NK.clone() for _ in range(copies - 1)))]  # type: ignore[misc]


def _limit_us(subject: Subject, batch: int, limits: Limits) -> float:
    """The weight, the input and the output each moved once; the product at the rate of its wider operand."""
    q, (rows, columns), size = subject.q, subject.w_NK.shape, subject.q.dtype.itemsize
    if subject.kernel.op == "embedding":
        each = q.packed_nbytes / rows
        return limits.us(nbytes=int(batch * (each + columns * size)), flops=0.0, bits=16)
    act = q.spec.act
    bits = 16 if act is None else max(act.element.bits, q.format.element.bits)
    nbytes = q.packed_nbytes + batch * (rows + columns) * size
    return limits.us(nbytes=nbytes, flops=2.0 * batch * rows * columns, bits=bits)


def _failure(
    op: str,
    scheme: str,
    shape: tuple[int, int],
    batch: int,
    device: str,
    dtype: torch.dtype,
    error: Exception,
    kernel: str = "",
) -> Timing:
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    nan = math.nan
    return Timing(
        op=op, scheme=str(Scheme.parse(scheme)), kernel=kernel, layout="", shape=shape, batch=batch, dtype=_name(dtype),
        device=device, error=nan, tolerance=nan, failed=why,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised is filled with NaN (integers: their maximum), the settings put back after."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)  # what switches torch.utils.deterministic's filling on
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
