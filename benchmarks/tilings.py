"""Every tiling of the mixed product on a GPU, and how far the rule that chooses is from the best of them.

    python benchmarks/tilings.py --shapes 28672x4096,4096x14336 --batch 1..4096       measure, append, then judge
    python benchmarks/tilings.py --judge                                              only judge results/tilings_gpu.csv

The constants in `src/lowp/kernels/cuda_/tiling.py` were fitted to these rows. The judge asks the rule, as it is now, for each
case, and looks the time of its choice up: regret = time of the choice / time of the best. It needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowp.cli.bench import batches_of, shapes_of
from lowp.kernels.cuda_ import mixed
from lowp.kernels.cuda_.tiling import Tiling, candidates, choose
from lowp.layouts import Spec
from lowp.layouts.base import Packed
from lowp.numerics import Scheme
from lowp.report.clock import median, rotation
from lowp.report.results import append, row
from lowp.tensor import QTensor

RESULTS = Path(__file__).parent / "results" / "tilings_gpu.csv"
KNOBS = tuple(field.name for field in dataclasses.fields(Tiling))
DECODE = "decode, then cuBLAS"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--shapes", default="28672x4096,4096x14336,6144x4096", help="rows out x columns in, or models, by commas"
    )
    p.add_argument("--schemes", default="int4", help="by commas")
    p.add_argument("--batch", default="1..4096", help="numbers of tokens")
    p.add_argument("--judge", action="store_true", help="measure nothing")
    p.add_argument("--csv", default=str(RESULTS), help="the file of the rows")
    return p.parse_args()


def measure(scheme: str, shape: tuple[int, int], batches: list[int], path: str) -> None:
    """Time every tiling that suits each batch, beside cuBLAS in bf16; a row each."""
    rows, columns = shape
    w_NK = 0.02 * torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    q = QTensor.quantize(w_NK, scheme).to_layout("fragments")
    copies = [{name: t.clone() for name, t in q.packed.items()} for _ in range(rotation(q.packed_nbytes, "cuda"))]
    floats = [w_NK.clone() for _ in range(rotation(2 * w_NK.numel(), "cuda"))]
    numbers = mixed._numbers(q.scheme, q.spec.shape, torch.bfloat16)
    for tokens in batches:
        x_MK = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        base = median([partial(linear, x_MK, w) for w in floats], "cuda").us
        found: list[dict[str, Any]] = []
        for tiling in (*candidates(tokens, columns, numbers), None):
            run = partial(_decoded, x_MK, q.spec) if tiling is None else partial(_tiled, x_MK, q.spec, tiling)
            calls = [partial(run, packed) for packed in copies]
            knobs = dict.fromkeys(KNOBS, "") if tiling is None else dataclasses.asdict(tiling)
            case = dict(scheme=q.scheme, M=tokens, N=rows, K=columns)
            what = DECODE if tiling is None else "mixed product"
            found.append(row(what, median(calls, "cuda").us, "us", base, device="cuda", **case, **knobs))
        append(path, found)


def _decoded(x_MK: Tensor, spec: Spec, packed: Packed) -> Tensor:
    return linear(x_MK, mixed.decode(packed, spec, x_MK.dtype))


def _tiled(x_MK: Tensor, spec: Spec, tiling: Tiling, packed: Packed) -> Tensor:
    return mixed.product(x_MK, packed, spec, None, tiling)


def judge(path: str) -> None:
    """Print where the rule's choice is more than a twentieth slower than the best, and how it does on average."""
    cases: dict[tuple[str, int, int, int], dict[tuple[int, ...], float]] = defaultdict(dict)
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["what"] == "mixed product":
                case = (line["scheme"], int(line["N"]), int(line["K"]), int(line["M"]))
                cases[case][tuple(int(line[knob]) for knob in KNOBS)] = float(line["value"])
    regrets = []
    for (scheme, rows, columns, tokens), times in cases.items():
        numbers = mixed._numbers(str(Scheme.parse(scheme)), (rows, columns), torch.bfloat16)
        offered = {dataclasses.astuple(one) for one in candidates(tokens, columns, numbers)}
        times = {knobs: time for knobs, time in times.items() if knobs in offered}  # and not what was, before
        chosen = choose(tokens, rows, columns, numbers, 132)
        time = times.get(dataclasses.astuple(chosen)) if chosen else None
        if time is None:
            print(f"{scheme} {rows}x{columns} M={tokens}: {chosen} was not measured")
            continue
        regrets.append(time / min(times.values()))
        if regrets[-1] > 1.05:
            best = dict(zip(KNOBS, min(times, key=lambda one: times[one]), strict=True))
            print(f"{regrets[-1]:.2f} {scheme} {rows}x{columns} M={tokens}: {chosen}, best {best}")
    if not regrets:
        print("no choice of the rule was measured")
        return
    print(f"{len(regrets)} cases: {statistics.mean(regrets):.3f} of the best on average, {max(regrets):.2f} at worst")


def main() -> int:
    args = arguments()
    if not args.judge:
        batches = batches_of(args.batch)
        for scheme in args.schemes.split(","):
            for shape in shapes_of(args.shapes):
                measure(str(Scheme.parse(scheme)), shape, batches, args.csv)
    judge(args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
