"""One step of low-bit optimizers against torch's fused AdamW with bf16 states, and CPU offload against copies in a row.

    python benchmarks/optim.py                       on a GPU: 24 bf16 parameters of 4096 x 14336, 1,000 of 64 Ki, the first step,
                                                     a step in a CUDA graph, offload of a model of 1.41 G parameters
    python benchmarks/optim.py --device cpu          on this CPU: 8 parameters of 1024 x 1024
    python benchmarks/optim.py --tiles               on a GPU: the kernel's tiles and warps, one after the other

torchao and bitsandbytes are measured beside where they are installed. Rows go to results/optim_gpu.csv or results/optim_cpu.csv:
milliseconds a step (median), bytes of state a parameter, and the limit: the bytes a step has to read and write, at --bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import nn

import lowp.optim as optim
from lowp.report.results import append, row

RESULTS = Path(__file__).parent / "results"
BASELINE = "torch AdamW fused, bf16 states"


def others() -> dict[str, Callable]:
    """Other projects' optimizers, where they are installed."""
    found: dict[str, Callable] = {}
    try:
        import torchao.optim as theirs

        found |= {f"torchao {name}": getattr(theirs, name) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")}
    except ImportError:
        pass
    try:
        import bitsandbytes

        found["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    except ImportError:
        pass
    return found


def ours() -> dict[str, Callable]:
    names = ("AdamW8bit", "AdamW4bit", "AdamWFp8", "Lion8bit")
    made: dict[str, Callable] = {name: getattr(optim, name) for name in names}
    made["SGD8bit"] = lambda params, lr: optim.SGD8bit(params, lr=lr, momentum=0.9)
    made["AdamW, bf16 states"] = lambda params, lr: optim.AdamW(params, lr=lr, state="bf16")
    made["AdamW8bit, stochastic rounding"] = lambda params, lr: optim.AdamW8bit(params, lr=lr, stochastic_rounding=True)
    return made


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Seconds of the first step, and milliseconds of a later one (median)."""
    start = clock(device)
    step()
    first = clock(device) - start
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
    return first, statistics.median(times)


def state_bytes(optimizer: torch.optim.Optimizer, count: int) -> float:
    if hasattr(optimizer, "state_nbytes"):
        return optimizer.state_nbytes() / count
    total = 0
    for held in optimizer.state.values():
        for value in held.values():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                inner = [getattr(value, name) for name in ("codes", "scale") if hasattr(value, name)] or [value]
                total += sum(t.numel() * t.element_size() for t in inner)
    return total / count


def one(
    what: str, make: Callable, shapes: list[tuple[int, ...]], device: torch.device, repeats: int, bandwidth: float
) -> dict:
    params = parameters(shapes, device)
    count = sum(p.numel() for p in params)
    optimizer = make(params, lr=1e-4)
    first, ms = timed(optimizer.step, device, repeats)
    held = state_bytes(optimizer, count)
    limit = 1e3 * count * (2 + 2 + 2 + 2 * held) / bandwidth  # read p, g, states; write p, states
    del optimizer, params
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"what": what, "ms": ms, "first_s": first, "state_bytes": held, "limit_ms": limit, "count": count}


def steps(
    made: dict[str, Callable], shapes: list[tuple[int, ...]], device: torch.device, repeats: int, bandwidth: float
) -> list[dict]:
    """Rows of one set of parameters: the baseline, then each of `made`."""
    base = one(BASELINE, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), shapes, device, repeats, bandwidth)
    rows = []
    for what, make in {BASELINE: None, **made}.items():
        try:
            found = base if make is None else one(what, make, shapes, device, repeats, bandwidth)
        except Exception as error:  # another project's optimizer that does not run here is a line, not the end
            if what in ours():
                raise
            print(f"{what}: {type(error).__name__}: {error}"[:300])
            continue
        more = {key: f"{found[key]:.4g}" for key in ("first_s", "state_bytes", "limit_ms")}
        rows.append(
            row(what, found["ms"], "ms a step", base["ms"], device=str(device), parameters=_named(shapes), **more)
        )
        print(rows[-1]["what"], rows[-1]["value"], rows[-1]["ratio"], more)
    return rows


def in_a_graph(shapes: list[tuple[int, ...]], device: torch.device, repeats: int) -> list[dict]:
    """AdamW8bit replayed in a CUDA graph."""
    params = parameters(shapes, device)
    optimizer = optim.AdamW8bit(params, lr=torch.tensor(1e-4, device=device), capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    _, ms = timed(graph.replay, device, repeats)
    more = {"first_s": "", "state_bytes": "", "limit_ms": ""}
    return [row("AdamW8bit in a CUDA graph", ms, "ms a step", device=str(device), parameters=_named(shapes), **more)]


# -- offload ----------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Pairs of linear layers, each computed again in the backward pass: what a pair keeps is its input."""

    def __init__(self, pairs: int, narrow: int, wide: int, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*sizes, bias=False, device=device, dtype=torch.bfloat16)
            for _ in range(pairs)
            for sizes in ((narrow, wide), (wide, narrow))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.layers[::2], self.layers[1::2], strict=True):

            def pair(x: torch.Tensor, up: nn.Module = up, down: nn.Module = down) -> torch.Tensor:
                return x + down(torch.nn.functional.silu(up(x)))

            x = torch.utils.checkpoint.checkpoint(pair, x, use_reentrant=False)
        return x


class Nothing:
    """Forward and backward alone."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        pass

    def step(self) -> None:
        pass


class Serial:
    """The plain way to offload: after the backward pass copy gradients down, step, copy parameters up, one after the other."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        pinned = params[0].device.type == "cuda"
        self.hosts = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned)) for p in params]
        for host, p in zip(self.hosts, params, strict=True):
            host.data.copy_(p)
            host.grad = torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned)
        self.optimizer = torch.optim.AdamW(self.hosts, lr=1e-4, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for host, p in zip(self.hosts, self.params, strict=True):
            host.grad.copy_(p.grad)
            p.grad = None
        self.optimizer.step()
        for host, p in zip(self.hosts, self.params, strict=True):
            p.copy_(host)


def offload(device: torch.device, pairs: int, narrow: int, wide: int, tokens: int, repeats: int) -> list[dict]:
    """Milliseconds of forward, backward and step, and the peak of the GPU's memory."""
    ways = {
        "no optimizer": Nothing,
        BASELINE: lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "offload, copies one after the other": Serial,
        "CPUOffloadOptimizer": lambda p: optim.CPUOffloadOptimizer(p, lr=1e-4),
        "CPUOffloadOptimizer, gradients too": lambda p: optim.CPUOffloadOptimizer(p, offload_gradients=True, lr=1e-4),
    }
    found = {}
    for what, make in ways.items():
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        net = Layers(pairs, narrow, wide, device)
        x = torch.randn(tokens, narrow, device=device, dtype=torch.bfloat16)
        optimizer = make(list(net.parameters()))

        def step(net=net, x=x, optimizer=optimizer) -> None:
            for p in net.parameters():
                p.grad = None
            net(x).square().mean().backward()
            optimizer.step()

        _, ms = timed(step, device, repeats)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        found[what] = ms, peak
        del net, optimizer, step
    name, rows = f"{2 * pairs} of {narrow}x{wide}, {tokens} tokens", []
    empty = {"parameters": name, "first_s": "", "state_bytes": "", "limit_ms": ""}
    serial = found["offload, copies one after the other"][0]
    for what, (ms, peak) in found.items():
        rows.append(row(f"{what}: forward, backward and step", ms, "ms", serial, device=str(device), **empty))
        if peak:
            rows.append(row(f"{what}: peak memory", peak, "GB", found[BASELINE][1], device=str(device), **empty))
        if what.startswith("CPUOffload"):
            hidden = 1 - (ms - found["no optimizer"][0]) / (serial - found["no optimizer"][0])
            rows.append(row(f"{what}: copies and step that are hidden", hidden, "of 1", device=str(device), **empty))
    for made in rows:
        print(made["what"], made["value"], made["ratio"])
    return rows


def tiles(shapes: list[tuple[int, ...]], device: torch.device, repeats: int) -> list[dict]:
    """The kernel under other tilings: what `_tiling` should say."""
    from lowp.kernels.triton_ import update

    rule = update._tiling
    for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8"):
        cuts = itertools.product((2048, 4096, 8192, 16384), (4, 8, 16), (8, 16), (0, 64, 80, 128))
        for tile, warps, wide, registers in cuts:
            if not 8 <= tile // (32 * warps) <= 32:
                continue
            tiling = update.Tiling(tile=tile, warps=warps, wide=wide, registers=registers)
            update._tiling = lambda formats, tiling=tiling: tiling
            update._PLANS.clear()
            found = one(name, getattr(optim, name), shapes, device, repeats, 4.25e12)
            print(f"{name} {tiling}: {found['ms']:.3f} ms, first step {found['first_s']:.2f} s", flush=True)
    update._tiling = rule
    return []


def _named(shapes: list[tuple[int, ...]]) -> str:
    return f"{len(shapes)} of {'x'.join(map(str, shapes[0]))}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--bandwidth", type=float, default=4.25e12, help="bytes a second, for the limit")
    p.add_argument("--tiles", action="store_true")
    p.add_argument("--without-others", action="store_true", help="lowp and torch alone")
    p.add_argument("--names", default="", help="of optimizers, with commas between; all if absent")
    p.add_argument("--only", choices=["steps", "small", "graph", "offload"], default=None)
    args = p.parse_args()
    device = torch.device(args.device)
    large, rows = device.type == "cuda", []
    shapes = [(4096, 14336)] * 24 if large else [(1024, 1024)] * 8
    small = [(256, 256)] * (1000 if large else 64)
    if args.tiles:
        tiles(shapes, device, args.repeats)
        return
    made = ours() | ({} if args.without_others else others())
    if args.names:
        made = {name: made[name] for name in args.names.split(",")}
    if args.only in (None, "steps"):
        rows += steps(made, shapes, device, args.repeats, args.bandwidth)
    if args.only in (None, "small"):
        rows += steps(made, small, device, args.repeats, args.bandwidth)
    if large and args.only in (None, "graph"):
        rows += in_a_graph(shapes, device, args.repeats) + in_a_graph(small, device, args.repeats)
    if args.only in (None, "offload"):
        sizes = (12, 4096, 14336, 4096) if large else (3, 512, 2048, 256)
        rows += offload(device, *sizes, repeats=5)
    append(RESULTS / ("optim_gpu.csv" if large else "optim_cpu.csv"), rows)


if __name__ == "__main__":
    main()
