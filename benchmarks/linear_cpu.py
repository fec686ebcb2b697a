"""Linear layers on this CPU: lowp's products beside those of torch, and of ggml where its driver was built.

    OMP_PROC_BIND=true python benchmarks/linear_cpu.py --threads 1 --ggml ./ggml_products       (see ggml_products.cpp)
    OMP_PROC_BIND=true python benchmarks/linear_cpu.py --threads 2 --brief --shapes 4096x14336,1000x4096 --batch 1,2,4,8,16,32

A row is one of lowp's schemes on one shape; its baseline is a peer's time in the same run: all take turns, a fiftieth of a second
each, on weights of 128 MB together (ggml's driver runs for a second right after). With one thread processor time is measured (a
shared machine does not count), with more wall time. `gbytes` and `gflops` are a second's; `load` is the machine's load average at
that row. At the end stands the smallest speed of each scheme over bf16, and where that is. `--brief` takes a scheme of each kind.

Peers: torch's bf16 linear, torch's own int4 and int8 products, oneDNN's int8 linear with a prepacked weight (its activation has
one scale for all tokens), torchao's eager tensors where torchao is installed, and ggml's at the same bits. ggml quantizes the
activation by 32 or 256 columns; the scheme beside it does so by 32 ("@int8/1x32"). Weight-only rows multiply bf16 by what was
stored.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    ("int4/1x32*bf16@int8/row", "q4_K", ""),
    ("int2/1x32*bf16@int8/1x32", "q2_K", ""),
    ("int3/1x64*bf16@int8/1x32", "q3_K-", ""),
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


Calls = list[Callable[[], Tensor]]


def in_turn(candidates: dict[str, Calls], seconds: float) -> dict[str, float]:
    """Median microseconds of each, all measured side by side: so much time for each, a slice at a time."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    until = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < until or min(map(len, times.values())) < 3:
        for name, calls in candidates.items():
            past, place = time.perf_counter() + SLICE, len(times[name])
            while True:
                start = now()
                calls[place % len(calls)]()
                times[name].append(now() - start)
                place += 1
                if time.perf_counter() > past:
                    break
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def kernel_calls(name: str, scheme: str, shape: tuple[int, int], x: Tensor) -> tuple[Calls, int]:
    """A kernel on copies of a weight, checked first, and the bytes of one."""
    kernel = next(one for one in kernels_of("linear") if one.name == name)
    q = QTensor.quantize(torch.randn(shape) * 0.05, scheme).to_layout(kernel.layout or "plain")
    error = relative_error(reference(x, q.packed, q.spec), kernel.run(x, q.packed, q.spec, None))
    if error > q.format.tolerance(torch.bfloat16):
        raise SystemExit(f"{name} on {scheme} {shape}: error {error}")
    copies = [q.packed]
    for _ in range(rotation(q.packed_nbytes, "cpu") - 1):
        copy = {part: tensor.clone() for part, tensor in q.packed.items()}
        copies.append(on_huge_pages(copy) if q.spec.layout == "planes" else copy)
    return [lambda packed=packed: kernel.run(x, packed, q.spec, None) for packed in copies], q.packed_nbytes


def bf16_calls(shape: tuple[int, int], x: Tensor) -> Calls:
    w = (torch.randn(shape) * 0.05).to(torch.bfloat16)
    copies = [w.clone() for _ in range(rotation(2 * w.numel(), "cpu"))]
    return [lambda w=w: F.linear(x, w) for w in copies]


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


def ggml_us(driver: str, name: str, shape: tuple[int, int], tokens: int, threads: int) -> float:
    command = [driver, name, *map(str, (*shape, tokens, threads))]
    environment = {**os.environ, "OMP_PROC_BIND": "true"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=every_core)
    if ran.returncode:
        print(f"ggml {name} {shape}: no time, exit status {ran.returncode}")
        return 0.0
    return 1e6 * float(ran.stdout.split()[-1])


@torch.no_grad()
def measure(scheme: str, shape: tuple[int, int], tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a scheme beside torch's bf16 and the peers of `PAIRS`."""
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    ours, nbytes = kernel_calls("planes", scheme, shape, x)
    candidates = {"": ours, "torch bf16": bf16_calls(shape, x)}
    pairs = [] if args.brief else [pair for pair in PAIRS if pair[0] == scheme]
    for _, _, peer in pairs:
        if peer:
            candidates[peer if " " in peer or peer == "torchao" else f"torch {peer}"] = peer_calls(
                peer, scheme, shape, x
            )
    us = in_turn({name: calls for name, calls in candidates.items() if calls}, args.seconds)
    for _, ggml, _ in pairs:
        if ggml and args.ggml:
            us[f"ggml {ggml.rstrip('-').upper()}"] = ggml_us(args.ggml, ggml, shape, tokens, args.threads)
    mine, (rows, columns) = us.pop(""), shape
    threads = f"{args.threads} thread" + ("s" if args.threads > 1 else "")
    what = f"{scheme} {rows}x{columns} {'decode' if tokens == 1 else f'{tokens} tokens'} {threads} against"
    more = dict(M=tokens, N=rows, K=columns, threads=args.threads, gbytes=round(nbytes / mine / 1e3, 1),
                gflops=round(2 * tokens * rows * columns / mine / 1e3, 1), load=os.getloadavg()[0])  # fmt: skip
    return [row(f"{what} {peer}", mine, "us", theirs, **more) for peer, theirs in us.items() if theirs]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--shapes", default="4096x4096")
    p.add_argument("--batch", default="1,512")
    p.add_argument("--schemes", default="", help="some of them; default: all")
    p.add_argument("--brief", action="store_true", help="a scheme of each kind, beside bf16 alone")
    p.add_argument("--seconds", type=float, default=0.3, help="for each candidate")
    p.add_argument("--ggml", default="", help="the driver that ggml_products.cpp builds")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    schemes = (
        args.schemes.split(",") if args.schemes else BRIEF if args.brief else dict.fromkeys(pair[0] for pair in PAIRS)
    )
    least: dict[str, tuple[float, str]] = {}
    for spelled in args.shapes.split(","):
        rows, columns = (int(size) for size in spelled.split("x"))
        for tokens in map(int, args.batch.split(",")):
            for scheme in schemes:
                made = measure(scheme, (rows, columns), tokens, args)
                append(RESULTS, made)
                for one in made:
                    print(
                        f"{one['what']}: {one['value']:.0f} us, {one['baseline']:.0f}, {1 / one['ratio']:.2f} times as fast",
                        flush=True,
                    )
                    if one["what"].endswith("bf16"):
                        found = (1 / one["ratio"], one["what"])
                        least[scheme] = min(least.get(scheme, found), found)
    for scheme, (speed, what) in least.items():
        print(f"{scheme}: at least {speed:.2f} of bf16's speed ({what})")


if __name__ == "__main__":
    main()
