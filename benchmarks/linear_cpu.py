"""Linear layers on this CPU: lowp's products beside those of torch, of ggml where its driver was built, and the speed of memory.

    export OMP_PROC_BIND=true
    python benchmarks/linear_cpu.py --threads 1 --ggml ./ggml_products                                (see ggml_products.cpp)
    python benchmarks/linear_cpu.py --threads 2 --brief --shapes 4096x14336,1000x4096 --batch 1,2,4,8,16,32
    python benchmarks/linear_cpu.py --roof --batch 1 --threads 2                                      share of the memory's speed
    python benchmarks/linear_cpu.py --set avx2 --batch 1 --ggml ./ggml_products_avx2                  both held to AVX2
    python benchmarks/linear_cpu.py --overhead                                                        a call on a tiny weight

A row is one of lowp's schemes on one shape; its baseline is a peer's time in the same run: all take turns, a fiftieth of a second
each, on weights of 128 MB together. With one thread processor time is measured (a shared machine does not count), with more wall
time. `gbytes` and `gflops` are a second's; `load` is the machine's load average at that row. At the end stands the smallest speed
of each scheme over bf16, and where that is. `--brief` takes a scheme of each kind, `--set` an instruction set (its name stands
after the threads in `what`).

Peers: torch's bf16 linear, the same with oneDNN's packed weight, torch's own int4 and int8 products, oneDNN's int8 linear with a
prepacked weight (its activation has one scale for all tokens), torchao's eager tensors where torchao is installed, and ggml's at
the same bits. ggml quantizes the activation by 32 columns, for its K types by 256: so do the schemes beside it ("@int8/1x256").
Weight-only rows multiply bf16 by what was stored. "a read" (`--roof`) reads the same tensors with as many threads, nothing
else (memory_read.cpp; wants g++), the faster of two ways: its time over ours is the share of the memory's speed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowp.kernels.cpu import library, planes
from lowp.layouts.base import Packed
from lowp.layouts.pages import on_huge_pages
from lowp.numerics.compare import relative_error
from lowp.ops.linear import reference
from lowp.ops.registry import kernels_of
from lowp.report.clock import rotation
from lowp.report.results import append, row
from lowp.tensor import QTensor

RESULTS = Path(__file__).parent / "results" / "linear_cpu.csv"
# scheme, ggml's type at the same bits, another product for it: torch's own, or one of `OTHERS`
PAIRS = (
    ("int4/1x32*bf16@int8/1x32", "q4_0", ""),
    ("int4/1x32*bf16@int8/1x32", "q4_K", ""),
    ("int4/1x32*bf16@int8/1x256", "q4_K", ""),
    ("int2/1x32*bf16@int8/1x32", "q2_K", ""),
    ("int2/1x32*bf16@int8/1x256", "q2_K", ""),
    ("int3/1x64*bf16@int8/1x32", "q3_K-", ""),
    ("int3/1x64*bf16@int8/1x256", "q3_K-", ""),
    ("int5/1x32*bf16@int8/1x256", "q5_K-", ""),
    ("int6/1x64*bf16@int8/1x256", "q6_K-", ""),
    ("int7/1x64*bf16@int8/1x256", "", ""),
    ("int8/1x32*bf16@int8/1x32", "q8_0-", ""),
    ("e2m1/1x32*e8m0@int8/1x32", "mxfp4", ""),
    ("int1/1x128*bf16+bf16@int8/row", "", ""),
    ("int4/1x32*bf16", "q4_0", "int4pack_cpu"),
    ("int4/1x128*bf16", "", "int4pack_cpu"),
    ("int8/row", "", "int8pack_cpu"),
    ("int8/row@int8/row", "", "int_mm"),
    ("int8/row@int8/row", "", "onednn qlinear"),
    ("int8/row@int8/row", "", "torchao"),
    ("int8/row", "", "torchao"),
    ("e4m3/row@e4m3/row", "", ""),
    ("nf4/1x64*bf16", "", ""),
    ("e4m3/row", "", ""),
    ("e2m1/1x16*e4m3/tensor", "", ""),
    ("int2/1x64*bf16", "", ""),
)
BRIEF = (
    "int4/1x32*bf16",
    "int4/1x32*bf16@int8/1x32",
    "int8/row",
    "int8/row@int8/row",
    "nf4/1x64*bf16",
    "e2m1/1x16*e4m3/tensor",
    "e4m3/row",
    "e4m3/row@e4m3/row",
)
SLICE = 0.02  # seconds that one candidate runs before the next has its turn


Calls = list[Callable[[], Any]]
Turn = Callable[[float], list[float]]  # runs for so many seconds and answers what each call took


def turn_of(calls: Calls) -> Turn:
    """Calls in turn, those on copies of a weight."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    done = 0

    def turn(seconds: float) -> list[float]:
        nonlocal done
        times, past = [], time.perf_counter() + seconds
        while not times or time.perf_counter() < past:
            call, done = calls[done % len(calls)], done + 1
            start = now()
            call()
            times.append(now() - start)
        return times

    return turn


def in_turn(candidates: dict[str, Turn], seconds: float) -> dict[str, float]:
    """Median microseconds of each, all measured side by side: so much time for each, a slice at a time. With several threads
    those of the one before are left to fall asleep first: they wait awake for some milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    pause = 0.0 if torch.get_num_threads() == 1 else 0.01
    for turn in candidates.values():
        turn(0.0)
    until = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < until or min(map(len, times.values())) < 3:
        for name, turn in candidates.items():
            time.sleep(pause)
            times[name] += turn(SLICE)
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def kernel_calls(name: str, scheme: str, shape: tuple[int, int], x: Tensor) -> tuple[Calls, list[Packed]]:
    """A kernel on copies of a weight, checked first, and the copies."""
    kernel = next(one for one in kernels_of("linear") if one.name == name)
    q = QTensor.quantize(torch.randn(shape) * 0.05, scheme).to_layout(kernel.layout or "plain")
    error = relative_error(reference(x, q.packed, q.spec), kernel.run(x, q.packed, q.spec, None))
    if error > q.format.tolerance(torch.bfloat16):
        raise SystemExit(f"{name} on {scheme} {shape}: error {error}")
    copies = [q.packed]
    for _ in range(rotation(q.packed_nbytes, "cpu") - 1):
        copy = {part: tensor.clone() for part, tensor in q.packed.items()}
        copies.append(on_huge_pages(copy) if q.spec.layout == "planes" else copy)
    return [lambda packed=packed: kernel.run(x, packed, q.spec, None) for packed in copies], copies


def nbytes_of(packed: Packed) -> int:
    return sum(tensor.nbytes for tensor in packed.values())


def read_calls(copies: list[Packed], threads: int, folder: str) -> Iterator[tuple[str, Calls]]:
    """Reads of the same tensors that do nothing else: as they come, and fetched 4 KB ahead."""
    built, source = Path(folder) / "memory_read.so", Path(__file__).parent / "memory_read.cpp"
    if not built.exists():
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(built)], check=True)
    read = ctypes.CDLL(str(built)).memory_read
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int], ctypes.c_uint64
    for ahead in (0, 4096):
        yield (
            f"a read, {ahead} ahead",
            [
                lambda packed=packed, ahead=ahead: [
                    read(part.data_ptr(), part.nbytes, ahead, threads) for part in packed.values()
                ]
                for packed in copies
            ],
        )


def bf16_calls(shape: tuple[int, int], x: Tensor) -> Calls:
    w = (torch.randn(shape) * 0.05).to(torch.bfloat16)
    copies = [w.clone() for _ in range(rotation(2 * w.numel(), "cpu"))]
    return [lambda w=w: F.linear(x, w) for w in copies]


def packed_bf16_calls(shape: tuple[int, int], x: Tensor) -> Calls:
    """bf16 in the layout that oneDNN would choose for this many tokens: what a compiled, frozen model runs."""
    w = (torch.randn(shape) * 0.05).to(torch.bfloat16)
    copies = [torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]) for _ in range(rotation(2 * w.numel(), "cpu"))]
    return [lambda w=w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "") for w in copies]


def onednn_calls(shape: tuple[int, int], x: Tensor) -> Calls:
    """int8 weights prepacked, the activation quantized to uint8 with one scale: what torch's quantized linear runs."""
    scale, ones = torch.full((shape[0],), 0.002), torch.zeros(shape[0], dtype=torch.int64)

    def run(packed: Tensor) -> Tensor:
        step = float(x.abs().max()) / 127
        codes = (x / step + 128).round_().clamp_(0, 255).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            codes, step, 128, packed, scale, ones, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    def pack() -> Tensor:
        return torch.ops.onednn.qlinear_prepack(torch.randint(-127, 128, shape, dtype=torch.int8), list(x.shape))

    copies = [pack() for _ in range(rotation(shape[0] * shape[1], "cpu"))]
    return [lambda one=one: run(one) for one in copies]


def torchao_calls(scheme: str, shape: tuple[int, int], x: Tensor) -> Calls:
    """torchao's int8 linear, eager; none where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return []
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig() if "@" in scheme else Int8WeightOnlyConfig()
    layers = [torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16) for _ in range(4)]
    for layer in layers:
        quantize_(layer, config)
    return [lambda layer=layer: layer(x) for layer in layers]


def peer_calls(peer: str, scheme: str, shape: tuple[int, int], x: Tensor) -> Calls:
    if peer == "onednn qlinear":
        return onednn_calls(shape, x)
    return torchao_calls(scheme, shape, x) if peer == "torchao" else kernel_calls(peer, scheme, shape, x)[0]


def every_core() -> None:
    """This process is bound to one core by then (OMP_PROC_BIND), and what it starts would stay there, all threads of it."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


def ggml_turn(
    driver: str, name: str, shape: tuple[int, int], tokens: int, threads: int, running: contextlib.ExitStack
) -> Turn | None:
    """ggml's driver in a process of its own, which computes when it is its turn and ends with `running`; None where it cannot
    (some types are repacked for AVX-512 alone)."""
    command = [driver, name, *map(str, (*shape, tokens, threads))]
    environment = {**os.environ, "OMP_PROC_BIND": "true"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process = running.enter_context(
        subprocess.Popen(command, text=True, env=environment, preexec_fn=every_core, **pipes)
    )
    assert process.stdin and process.stdout
    ask, answer = process.stdin, process.stdout
    if not answer.readline():
        print(f"ggml {name} {shape}: no time, {driver} ends with status {process.wait()}")
        return None

    def turn(seconds: float) -> list[float]:
        print(seconds, file=ask, flush=True)
        return [float(word) for word in answer.readline().split()]

    return turn


def candidates_of(
    scheme: str, shape: tuple[int, int], x: Tensor, args: argparse.Namespace, running: contextlib.ExitStack
) -> dict[str, Turn]:
    """torch's bf16 and the peers of `PAIRS`."""
    pairs = [pair for pair in PAIRS if pair[0] == scheme]
    found: dict[str, Calls] = {}
    if not args.set:
        found = {"torch bf16": bf16_calls(shape, x), "torch bf16 packed": packed_bf16_calls(shape, x)}
    turns: dict[str, Turn] = {}
    for _, ggml, peer in pairs:
        if peer and not args.brief and not args.set:
            name = peer if " " in peer or peer == "torchao" else f"torch {peer}"
            found[name] = peer_calls(peer, scheme, shape, x)
        if ggml and args.ggml:
            name = f"ggml {ggml.rstrip('-').upper()}"
            if turn := ggml_turn(args.ggml, ggml, shape, x.shape[0], args.threads, running):
                turns[name] = turn
    turns |= {name: turn_of(calls) for name, calls in found.items() if calls}
    return turns


@torch.no_grad()
def measure(scheme: str, shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a scheme beside its peers, or beside a read of its bytes."""
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    ours, copies = kernel_calls("planes", scheme, shape, x)
    with contextlib.ExitStack() as running:
        if args.roof:
            turns = {name: turn_of(calls) for name, calls in read_calls(copies, args.threads, args.folder)}
        else:
            turns = candidates_of(scheme, shape, x, args, running)
        us = in_turn({"": turn_of(ours), **turns}, args.seconds)
    mine, (rows, columns) = us.pop(""), shape
    if args.roof:
        us = {"a read": min(us.values())}
    threads = f"{args.threads} thread" + ("s" if args.threads > 1 else "") + f" {args.set}".rstrip()
    what = f"{scheme} {rows}x{columns} {'decode' if tokens == 1 else f'{tokens} tokens'} {threads} against"
    more = dict(M=tokens, N=rows, K=columns, threads=args.threads, gbytes=round(nbytes_of(copies[0]) / mine / 1e3, 1),
                gflops=round(2 * tokens * rows * columns / mine / 1e3, 1), load=os.getloadavg()[0])  # fmt: skip
    return [row(f"{what} {peer}", mine, "us", theirs, **more) for peer, theirs in us.items()]


@torch.inference_mode()
def overhead(seconds: float) -> list[dict[str, Any]]:
    """A call on a weight of 16 x 32, where nothing is computed to speak of: of the operator, and of `F.linear`."""
    x, w = torch.randn(1, 32, dtype=torch.bfloat16), torch.randn(16, 32, dtype=torch.bfloat16)
    weight = QTensor.quantize(w, "int4/1x32*bf16").to_layout("planes")
    told = planes._told(weight.scheme, (16, 32))
    operator, parts = torch.ops.lowp.planes_linear, planes._weight(weight.packed)
    calls: dict[str, Calls] = {
        "torch bf16": [lambda: F.linear(x, w)],
        "the operator": [lambda: operator(x, *parts, None, None, None, *told)],
        "F.linear": [lambda: F.linear(x, weight)],
    }
    # A hundred at a time: the clock costs a call's time itself.
    us = in_turn({name: turn_of([lambda c=c: [c() for _ in range(100)]]) for name, (c,) in calls.items()}, seconds)
    more = dict(M=1, N=16, K=32, threads=1, gbytes=0.0, gflops=0.0, load=os.getloadavg()[0])
    return [
        row(f"int4/1x32*bf16 16x32 call of {name} 1 thread against torch bf16", us[name] / 100, "us",
            us["torch bf16"] / 100, **more) for name in ("the operator", "F.linear")
    ]  # fmt: skip


def report(made: list[dict[str, Any]], results: Path) -> None:
    append(results, made)
    for one in made:
        print(
            f"{one['what']}: {one['value']:.2f} us, {one['baseline']:.2f}, {1 / one['ratio']:.2f} times as fast",
            flush=True,
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--shapes", default="4096x4096")
    p.add_argument("--batch", default="1,512")
    p.add_argument("--schemes", default="", help="some of them; default: all")
    p.add_argument("--brief", action="store_true", help="a scheme of each kind, beside bf16 and ggml alone")
    p.add_argument("--seconds", type=float, default=0.3, help="for each candidate")
    p.add_argument("--ggml", default="", help="the driver that ggml_products.cpp builds")
    p.add_argument("--set", default="", help="hold lowp to this instruction set: avx2, avxvnni, avx512vnni ...")
    p.add_argument("--roof", action="store_true", help="beside a read of the same bytes, and nothing else")
    p.add_argument("--overhead", action="store_true", help="what a call costs, and nothing else")
    p.add_argument("--results", type=Path, default=RESULTS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.set:
        library.use(args.set)
    if args.overhead:
        torch.set_num_threads(1)
        report(overhead(args.seconds), args.results)
        return
    schemes = (
        args.schemes.split(",") if args.schemes else BRIEF if args.brief else dict.fromkeys(pair[0] for pair in PAIRS)
    )
    least: dict[str, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory() as args.folder:
        for spelled in args.shapes.split(","):
            rows, columns = (int(size) for size in spelled.split("x"))
            for tokens in map(int, args.batch.split(",")):
                for scheme in schemes:
                    made = measure(scheme, (rows, columns), tokens, args)
                    report(made, args.results)
                    for one in made:
                        if one["what"].endswith("bf16"):
                            found = (1 / one["ratio"], one["what"])
                            least[scheme] = min(least.get(scheme, found), found)
    for scheme, (speed, what) in least.items():
        print(f"{scheme}: at least {speed:.2f} of bf16's speed ({what})")


if __name__ == "__main__":
    main()
