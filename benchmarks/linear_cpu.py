"""Linear layers on this CPU: lowp's products beside those of torch, and of ggml where its driver was built.

    OMP_PROC_BIND=true python benchmarks/linear_cpu.py --threads 1
    OMP_PROC_BIND=true python benchmarks/linear_cpu.py --threads 2 --ggml /tmp/ggml_products       (see ggml_products.cpp)

A row is one of lowp's schemes on one shape; its baseline is a peer's time in the same run, minutes apart at most, weights of
128 MB together taken in turn. With one thread processor time is measured (a shared machine does not count), with more wall time.
`gbytes` and `gflops` are a second's; `load` is the machine's load average at that row.

Peers: torch's bf16 linear, torch's own int4 and int8 products, and ggml's at the same bits. ggml quantizes the activation by 32
or 256 columns; the scheme beside it does so by 32 ("@int8/1x32"). Weight-only rows multiply bf16 by what was stored.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F

from lowp.numerics.compare import relative_error
from lowp.ops.linear import reference
from lowp.ops.registry import kernels_of
from lowp.report.clock import median, rotation
from lowp.report.results import append, row
from lowp.tensor import QTensor

RESULTS = Path(__file__).parent / "results" / "linear_cpu.csv"
# scheme, ggml's type at the same bits, torch's own kernel for it
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
    ("nf4/1x64*bf16", "", ""),
    ("e4m3/row", "", ""),
    ("e2m1/1x16*e4m3/tensor", "", ""),
    ("int2/1x64*bf16", "", ""),
)


def kernel_us(name: str, scheme: str, shape: tuple[int, int], tokens: int) -> tuple[float, int]:
    """Median microseconds of a kernel, checked first, and the bytes of its weight."""
    kernel = next(one for one in kernels_of("linear") if one.name == name)
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    q = QTensor.quantize(torch.randn(shape) * 0.05, scheme).to_layout(kernel.layout or "plain")
    error = relative_error(reference(x, q.packed, q.spec), kernel.run(x, q.packed, q.spec, None))
    if error > q.format.tolerance(torch.bfloat16):
        raise SystemExit(f"{name} on {scheme} {shape}: error {error}")
    copies = [q.packed] + [q.map(torch.clone).packed for _ in range(rotation(q.packed_nbytes, "cpu") - 1)]
    calls = [lambda packed=packed: kernel.run(x, packed, q.spec, None) for packed in copies]
    return median(calls, "cpu").us, q.packed_nbytes


def bf16_us(shape: tuple[int, int], tokens: int) -> float:
    w = (torch.randn(shape) * 0.05).to(torch.bfloat16)
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    copies = [w.clone() for _ in range(rotation(2 * w.numel(), "cpu"))]
    return median([lambda w=w: F.linear(x, w) for w in copies], "cpu").us


def ggml_us(driver: str, name: str, shape: tuple[int, int], tokens: int, threads: int) -> float:
    command = [driver, name, *map(str, (*shape, tokens, threads))]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_PROC_BIND": "true"})
    if ran.returncode:
        print(f"ggml {name} {shape}: no time, exit status {ran.returncode}")
        return 0.0
    return 1e6 * float(ran.stdout.split()[-1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--shapes", default="4096x4096")
    p.add_argument("--batch", default="1,512")
    p.add_argument("--ggml", default="", help="the driver that ggml_products.cpp builds")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    threads = f"{args.threads} thread" + ("s" if args.threads > 1 else "")
    for spelled in args.shapes.split(","):
        rows, columns = (int(size) for size in spelled.split("x"))
        for tokens in map(int, args.batch.split(",")):
            bf16, peers = bf16_us((rows, columns), tokens), dict[tuple[str, str], float]()
            for scheme, ggml, torchs in PAIRS:
                ours, nbytes = kernel_us("planes", scheme, (rows, columns), tokens)
                beside = {"torch bf16": bf16}
                if torchs:
                    key = (torchs, scheme)
                    peers[key] = peers.get(key) or kernel_us(torchs, scheme, (rows, columns), tokens)[0]
                    beside[f"torch {torchs}"] = peers[key]
                if ggml and args.ggml:
                    beside[f"ggml {ggml.rstrip('-').upper()}"] = ggml_us(
                        args.ggml, ggml, (rows, columns), tokens, args.threads
                    )
                what = f"{scheme} {spelled} {'decode' if tokens == 1 else f'{tokens} tokens'} {threads} against"
                more = dict(M=tokens, N=rows, K=columns, threads=args.threads, gbytes=round(nbytes / ours / 1e3, 1),
                            gflops=round(2 * tokens * rows * columns / ours / 1e3, 1), load=os.getloadavg()[0])  # fmt: skip
                made = [row(f"{what} {peer}", ours, "us", us, **more) for peer, us in beside.items() if us]
                append(RESULTS, made)
                for one in made:
                    print(f"{one['what']}: {ours:.0f} us, {one['baseline']:.0f}, {1 / one['ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
