"""Every kernel of the table on the device at hand: right first, then how fast, beside torch's float op.

    python benchmarks/run.py                                    the CPU
    python benchmarks/run.py --device cuda --shapes 4096x4096,14336x4096 --batch 1,16,256,4096
    python benchmarks/run.py --kernels int4pack_cpu --no-record

What is run is what the table says: each kernel with its own `cases`. A kernel that cannot run here is listed with its reason;
one whose result is wrong is listed as wrong, gets no row, and the run ends with exit code 1. Rows are appended to
results/kernels.csv. `lowp bench` measures one case by the same code, `lowp.report.bench`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from lowp.cli.app import dtype_of, show
from lowp.cli.bench import batches_of, shapes_of, timing_table
from lowp.report.bench import OPS, Timing, bench_kernel, runnable
from lowp.report.clock import limits
from lowp.report.results import append, device_name

RESULTS = Path(__file__).parent / "results" / "kernels.csv"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32, of activations")
    p.add_argument("--shapes", default="4096x4096", help="rows out x columns in, or models, by commas")
    p.add_argument("--batch", default="1,16,256", help="numbers of tokens, by commas; 1..64 for powers of two")
    p.add_argument("--kernels", default="", help="only these, by commas")
    p.add_argument("--no-record", action="store_true", help="append nothing to the results")
    return p.parse_args()


def main() -> int:
    args = arguments()
    dtype, wanted = dtype_of(args.dtype), set(filter(None, args.kernels.split(",")))
    batches = batches_of(args.batch)
    found: list[Timing] = []
    known = limits(args.device)
    for shape in shapes_of(args.shapes):
        for op in OPS:
            for kernel, scheme, why_not in runnable(op, device=args.device, dtype=dtype, shape=shape):
                if wanted and kernel.name not in wanted:
                    continue
                if why_not:
                    print(f"{op} {kernel.name} {scheme}: {why_not}")
                    continue
                found += bench_kernel(kernel, scheme, shape, batches, device=args.device, dtype=dtype, limits=known)
    show(timing_table(found, f"kernels on {device_name(args.device)}, {args.dtype} activations"))
    for one in found:
        if not one.right:
            print(one.why_wrong())
    if not args.no_record:
        append(RESULTS, [one.to_row() for one in found if one.right])
    return 0 if all(one.right for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
