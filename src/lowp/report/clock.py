"""How long a call takes on a device, and how fast the device could be.

    CPU    the median of calls on copies of the weight in turn: of processor time with one thread, else of wall time
    CUDA   L calls captured in one graph, replayed R times between events: the median replay / L

Why a graph: a launch from Python costs more than a small kernel runs, and serving engines replay graphs too. Why several calls:
the weights of a model do not fit the L2 cache, so when a layer comes round again its weight is read from memory. Each call of the
graph reads another copy of the weight, `rotation` of them, which together are 3 times the size of L2; on a CPU 128 MB together.

The limits of a device are measured in the same run, cards and clocks differ:

    bytes/s     the better of a copy (read + written) and a read of 1 GiB
    flops/s     2 * 8192**3 / time of torch's bf16 product; for 8-bit operands the better of `_scaled_mm` and `_int_mm`
    limit       max(bytes / bytes_per_s, flops / flops_per_s)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_SECONDS = 0.2  # how long each median is taken over on a CPU
_CPU_BYTES = (
    1 << 27
)  # of the copies of a weight on a CPU: 4 times the 32 MB of last cache that a few cores of a server share
_GRAPH_US = 1000.0  # a graph is that long at least, so that the 2 us around a replay are 0.2 % of it
_LAUNCHES = 200  # and has no more launches than that: each costs host time once
_LONG_US = 20_000.0  # beside a call that long a launch is nothing: it needs no graph
_REPLAYS_US = 12_000.0  # all replays together, and
_REPLAYS = (3, 25)  # at least, at most so many
_COPIES = 96  # of a weight, at most
_SIDE = 8192  # of the square matrices whose product gives flops/s


@dataclass(frozen=True, kw_only=True)
class Time:
    """A median in microseconds; `note` says how it was taken where that is not the usual way."""

    us: float
    note: str = ""


@torch.no_grad()
def median(calls: Sequence[Callable[[], Tensor]], device: str) -> Time:
    """The median time of one call.

    Args:
        calls: the same work on copies of what it reads, called in turn. device: where it runs.
    """
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return _graph_median(calls)
    return Time(us=_cpu_median(calls))


def rotation(nbytes: int, device: str) -> int:
    """How many copies of a weight of so many bytes do not fit the caches."""
    if not nbytes or torch.device(device).type not in ("cpu", "cuda"):
        return 1
    if torch.device(device).type == "cpu":
        return max(1, min(math.ceil(_CPU_BYTES / nbytes), _COPIES))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(math.ceil(3 * cache / nbytes), _COPIES))


def lost(device: str) -> bool:
    """True where a kernel broke the CUDA context (a wrong address): nothing runs in this process any more."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def _cpu_median(calls: Sequence[Callable[[], Tensor]]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    in_turn, times = itertools.cycle(calls), list[float]()
    next(in_turn)()  # the first may compile, or wake threads
    until = time.perf_counter() + CPU_SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        call, start = next(in_turn), clock()
        call()
        times.append(clock() - start)
    return 1e6 * statistics.median(times)


# -- CUDA -------------------------------------------------------------------------------------------------------------


def _graph_median(calls: Sequence[Callable[[], Tensor]]) -> Time:
    once = statistics.median(
        event_us([calls[0]] * 3)
    )  # the host's time too: too long for a small kernel, right for a large one
    if once > _LONG_US:
        return Time(us=once)
    launches = min(max(math.ceil(_GRAPH_US / once), _rotated(len(calls), once)), _LAUNCHES)
    in_turn = list(itertools.islice(itertools.cycle(calls), launches))
    # A model that is captured ran before, and kernels may begin early on a weight that was read before.
    for call in calls[1:launches]:
        call()
    try:
        graph = _captured(in_turn)
    except RuntimeError as error:  # something waits for the device: it cannot be in a graph, so its launch costs count
        return Time(us=statistics.median(event_us(in_turn)), note=f"no CUDA graph: {_line(error)}")
    first = event_us([graph.replay] * 2)[1]
    replays = min(max(int(_REPLAYS_US / first), _REPLAYS[0]), _REPLAYS[1])
    times = event_us([graph.replay] * replays)
    graph.reset()
    return Time(us=statistics.median(times) / launches)


def _rotated(copies: int, once: float) -> int:
    """How many calls rotate through the copies: all of them, fewer where a call is so long that it sweeps L2 by itself."""
    return min(copies, max(1, int(10 * _GRAPH_US / once)))


def _captured(calls: Sequence[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls. By hand, because `torch.cuda.graph` empties torch's cache of memory each time."""
    pool, stream, _ = _pool(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _refuse_waiting(calls[0])
        graph.capture_begin(pool=pool)
        try:
            for call in calls:
                call()  # its result goes back to the pool at once
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _refuse_waiting(call: Callable[[], Tensor]) -> None:
    """Call it once, on the stream of the capture, so that cuBLAS has its workspace there; what waits for the device raises here,
    where nothing breaks, and not in the middle of a capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode does not see everything: what it misses, the capture does
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()


@functools.cache
def _pool(device: int) -> tuple[tuple[int, int], torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """The memory that all captured graphs of a device share, one at a time, the stream that they are captured on, and an
    empty graph that keeps the memory alive between them."""
    keeper, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.graph(keeper, stream=stream):
        torch.zeros(1, device=device)
    return keeper.pool(), stream, keeper


def event_us(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Microseconds of each call on the current CUDA device, all of them queued before the first is waited for."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


# -- what the device could do -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a device was seen to do: bytes a second, and operations a second of products of bf16 and of 8-bit operands."""

    bytes_per_s: float
    bf16_per_s: float
    bits8_per_s: float

    def us(self, *, nbytes: int, flops: float, bits: int) -> float:
        """The least time in microseconds of a product that moves so many bytes and has operands of so many bits.

        >>> Limits(bytes_per_s=4e12, bf16_per_s=8e14, bits8_per_s=16e14).us(nbytes=8_000_000, flops=8e6, bits=16)
        2.0
        """
        rate = self.bits8_per_s if bits <= 8 else self.bf16_per_s
        return 1e6 * max(nbytes / self.bytes_per_s, flops / rate)

    def __str__(self) -> str:
        return (
            f"{self.bytes_per_s / 1e12:.2f} TB/s, {self.bf16_per_s / 1e12:.0f} TFLOP/s in bf16, "
            f"{self.bits8_per_s / 1e12:.0f} in 8 bits"
        )


def limits(device: str) -> Limits | None:
    """Measure them; None on a CPU, whose cache and clock leave no one figure."""
    if torch.device(device).type != "cuda":
        return None
    with torch.cuda.device(device), torch.no_grad():
        return Limits(bytes_per_s=_bytes_per_s(), bf16_per_s=_flops_per_s((_bf16_product,)), bits8_per_s=_bits8_per_s())


def _bytes_per_s() -> float:
    data = torch.ones(2**28, device="cuda")  # 1 GiB of float32
    target = torch.empty_like(data)
    copy = min(event_us([lambda: target.copy_(data)] * 10)[2:])
    read = min(event_us([lambda: data.sum()] * 10)[2:])
    nbytes = data.numel() * data.element_size()
    return 1e6 * max(2 * nbytes / copy, nbytes / read)


def _bits8_per_s() -> float:
    return max(_flops_per_s((_float8_product, _int8_product)), _flops_per_s((_bf16_product,)))


def _flops_per_s(products: Sequence[Callable[[Tensor], Callable[[], Tensor]]]) -> float:
    """The best of some products of square matrices; 0 where this GPU has none of them."""
    x = torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
    best = 0.0
    for product in products:
        try:
            times = event_us([product(x)] * 10)
        except RuntimeError:
            continue
        best = max(best, 1e6 * 2 * _SIDE**3 / statistics.median(times[2:]))
        time.sleep(0.05)  # let the card cool: what is measured is a product, not a long run of them
    return best


def _bf16_product(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x @ x.t()


def _float8_product(x: Tensor) -> Callable[[], Tensor]:
    x8, one = x.to(torch.float8_e4m3fn), torch.ones((), device=x.device)
    return lambda: torch._scaled_mm(x8, x8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _int8_product(x: Tensor) -> Callable[[], Tensor]:
    x8 = (x * 30).to(torch.int8)
    return lambda: torch._int_mm(x8, x8.t())
