"""The main job of lowp on a real model: in every format, how small does it get, and what does that cost?

    python examples/demo.py                     the bundled model, a part of its held-out text, a few minutes on 2 cores
    python examples/demo.py --tokens 0          the whole text
    python examples/demo.py --record            also append to benchmarks/results/quality.csv, and renew docs/img/demo.png

What is compared. The weights of the linear layers in each format, weight-only: activations stay as they are, so that a row
shows the format and nothing else. The token table, which is also the output layer of this model (the two are tied), is int8/row
in every row, for it is a fifth of the model; norms stay in bf16. Sizes are of all parameters, unquantized ones counted as bf16.

How it is measured. Each weight is quantized, then decoded once into float32, and the model computes in float32: on a CPU
without bf16 units that is the fastest arithmetic, and the differences are those of the weights alone. What a kernel adds by
rounding in bf16 is seen in the second half, where the same model goes through the command line: quantize, eval, generate.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait in a spin slow a busy machine down twofold

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import lowp
from lowp.cli.eval import load
from lowp.integrations import transformers as hf
from lowp.numerics import Scheme
from lowp.report import Evaluation, Quality, evaluation, measure, tokens_of
from lowp.report.continuation import Continuation, continuation
from lowp.report.layers import counted_as
from lowp.report.page import page
from lowp.report.plots import picture
from lowp.report.results import append, device_name, row

ROOT = Path(__file__).parents[1]
TABLE = {"model.embed_tokens": "int8/row"}  # the token table, tied to the output layer
TITLE = "A small language model in every format"
CAPTION = (
    "Weight-only. The token table, tied to the output layer, is int8/row in every quantized row; norms stay bf16. "
    "Bits and MB as held in memory, scales included."
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Case:
    """A row of the table: its name, the scheme of the linear layers, and the method."""

    name: str
    scheme: str
    method: str = "absmax"


def weight_only(preset: str) -> str:
    """The weight's format of a preset that may quantize activations too."""
    return str(Scheme.parse(preset).weight)


CASES = (
    Case("int8", lowp.INT8),
    Case("fp8", lowp.FP8),
    Case("mxfp8", weight_only(lowp.MXFP8)),
    Case("nvfp4", weight_only(lowp.NVFP4)),
    Case("mxfp4", weight_only(lowp.MXFP4)),
    Case("nf4", lowp.NF4),
    Case("int4", lowp.INT4),
    Case("int4 hqq", lowp.INT4, "hqq"),
    Case("int3", lowp.INT3),
    Case("int3 hqq", lowp.INT3, "hqq"),
    Case("int2", lowp.INT2),
    Case("int2 hqq", lowp.INT2, "hqq"),
)


# -- quantize, measure, write -----------------------------------------------------------------------------------------


def quantized(original: Any, bar: Progress) -> dict[str, tuple[Any, lowp.quantize.Report]]:
    """Each case's model and the report of its quantization."""
    task, made = bar.add_task("quantize", total=len(CASES), detail=""), {}
    for case in CASES:
        bar.update(task, detail=f"{case.name}  {case.scheme}")
        model = copy.deepcopy(original)
        report = lowp.quantize_(model, TABLE | {"*": case.scheme}, method=case.method)
        made[case.name] = (model, report)
        bar.advance(task)
    bar.update(task, detail=f"{len(CASES)} models")
    return made


def measured(original: Any, models: dict[str, Any], ids: torch.Tensor, bar: Progress) -> dict[str, Quality]:
    """Each model's quality on the text."""
    task = bar.add_task("measure", total=len(ids) - 1, detail="")

    def on_batch(done: int, total: int) -> None:
        bar.update(task, completed=done, detail=f"{done} of {total} tokens, {len(models)} models and the original")

    on_batch(0, len(ids) - 1)
    return measure(original, models, ids, on_batch=on_batch)


def written(models: dict[str, Any], tokenizer: Any, args: argparse.Namespace, bar: Progress) -> dict[str, Continuation]:
    """What each model writes after the prompt: drawn with the same seed, so that equal models write equal texts."""
    task, made = bar.add_task("generate", total=len(models), detail=""), {}
    for name, model in models.items():
        bar.update(task, detail=name)
        made[name] = continuation(
            model, tokenizer, args.prompt, max_new_tokens=args.new_tokens, temperature=0.5, seed=args.seed
        )
        bar.advance(task)
    bar.update(task, detail=f"{args.new_tokens} tokens each")
    return made


# -- show -------------------------------------------------------------------------------------------------------------


def result_table(evaluations: list[Evaluation]) -> Table:
    """The summary for the terminal."""
    made = Table(
        title=f"[bold]{TITLE}", title_justify="left", caption=CAPTION, caption_justify="left", box=None, pad_edge=False
    )
    made.add_column("", style="bold", no_wrap=True)
    made.add_column("scheme", style="dim", overflow="fold")
    for name in ("bits", "MB", "smaller", "perplexity", "change", "KL, nats", "same top token"):
        made.add_column(name, justify="right", no_wrap=True)
    first = evaluations[0]
    made.add_row(
        "bf16",
        "original",
        "16.00",
        f"{first.bytes_before / 1e6:.2f}",
        "1.00x",
        f"{first.quality.original_perplexity:.3f}",
    )
    for one in evaluations:
        q = one.quality
        made.add_row(
            one.name, one.scheme, f"{one.bits:.2f}", f"{one.bytes_after / 1e6:.2f}", f"{one.bytes_before / one.bytes_after:.2f}x",
            f"{q.perplexity:.3f}", f"{100 * (q.ratio - 1):+.2f} %", f"{q.kl:.4f}", f"{100 * q.top1:.1f} %",
        )  # fmt: skip
    return made


def text_table(texts: dict[str, Continuation], prompt: str) -> Table:
    """What each model wrote, on one line each."""
    made = Table(title=f"[bold]What each writes after[/] {prompt!r}", title_justify="left", box=None, pad_edge=False)
    made.add_column("", style="bold", no_wrap=True)
    made.add_column("")
    for name, one in texts.items():
        made.add_row(name, " ".join(one.text.split()).replace("[", "\\["))
    return made


def insane(evaluations: list[Evaluation]) -> list[str]:
    """What would be wrong with the figures: empty where they are as they should be."""
    by_name = {one.name: one.quality for one in evaluations}
    found = [
        f"{name} costs {100 * (by_name[name].ratio - 1):.2f} % of perplexity, at most 0.5 % is expected"
        for name in ("int8", "fp8")
        if abs(by_name[name].ratio - 1) > 0.005
    ]
    for better, worse in (("int8", "int4"), ("int4", "int3"), ("int3", "int2"), ("mxfp8", "mxfp4"), ("fp8", "nvfp4")):
        if not by_name[better].kl < by_name[worse].kl:
            found.append(f"{worse} is nearer to the original than {better}")
    for name in ("int4", "int3", "int2"):
        if by_name[f"{name} hqq"].kl > by_name[name].kl or by_name[f"{name} hqq"].perplexity > by_name[name].perplexity:
            found.append(f"hqq is worse than absmax for {name}")
    return found


# -- the life of one model, on the command line -----------------------------------------------------------------------


def command_line(args: argparse.Namespace, out: Path) -> None:
    """Quantize, inspect, evaluate and generate by the same commands that a user types."""
    target = out / "small_lm-int4"
    model, text = os.path.relpath(args.model), os.path.relpath(args.text)
    lowp_ = ["quantize", model, "--to", "int4", "--rule", "model.embed_tokens=int8", "--method", "hqq"]
    shell([*lowp_, "--out", os.path.relpath(target), "--overwrite"])
    shell(["eval", os.path.relpath(target), "--against", model, "--text", text, "--tokens", "2048"])
    shell(["generate", os.path.relpath(target), "--prompt", args.prompt, "--max-new-tokens", str(args.new_tokens)])


def shell(words: list[str]) -> None:
    """Run `lowp WORDS` as a process of its own; a failure ends the demo."""
    console.print(
        f"\n[bold green]$[/] [bold]lowp {' '.join(word if word.isascii() and ' ' not in word else repr(word) for word in words)}"
    )
    sys.stdout.flush()
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, "-m", "lowp.cli", *words], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    if ran.returncode:
        raise SystemExit(ran.returncode)


# -- results ----------------------------------------------------------------------------------------------------------


def record(evaluations: list[Evaluation], path: Path, args: argparse.Namespace) -> None:
    """Append the figures to the results."""
    methods = {case.name: case.method for case in CASES}
    rows = []
    for one in evaluations:
        q, more = (
            one.quality,
            dict(
                model=args.model.name,
                scheme=one.scheme,
                method=methods[one.name],
                text=args.text.name,
                tokens=one.quality.tokens,
            ),
        )
        rows += [
            row("perplexity", q.perplexity, "1", q.original_perplexity, **more),
            row("KL to the original", q.kl, "nats a token", None, **more),
            row("top-1 agreement", q.top1, "share", 1.0, **more),
            row("bytes", one.bytes_after, "B", one.bytes_before, **more),
        ]
    count = append(path, rows)
    console.print(f"{count} rows appended to {os.path.relpath(path)}")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=ROOT / "examples" / "small_lm", help="a Hugging Face directory")
    p.add_argument("--text", type=Path, help="held-out text; heldout.txt of the model if absent")
    p.add_argument("--tokens", type=int, default=6144, help="how many tokens of the text; 0 for all")
    p.add_argument("--prompt", default="The CREATE INDEX command")
    p.add_argument("--new-tokens", type=int, default=40)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="where the report and the checkpoint go")
    p.add_argument("--record", action="store_true", help="append to the results and renew the picture in the docs")
    args = p.parse_args()
    args.text = args.text or args.model / "heldout.txt"
    return args


def main() -> None:
    args, start = arguments(), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = hf.tokenizer(args.model)
    original = load(str(args.model), "cpu", "fp32")
    ids = tokens_of(tokenizer, args.text.read_text(encoding="utf-8"), args.tokens or None)
    count = sum(p.numel() for p in original.parameters())
    facts = {
        "model": f"{args.model.name}, {count / 1e6:.2f} M parameters",
        "text": f"{args.text.name}, {len(ids) - 1} tokens",
        "device": device_name("cpu"),
    }
    console.print(*(f"[dim]{key}[/] {value}" for key, value in facts.items()), sep="   ")
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as bar:
        models = quantized(original, bar)
        decoded = {name: lowp.dequantize_(copy.deepcopy(model)) for name, (model, _) in models.items()}
        qualities = measured(original, decoded, ids, bar)
        texts = written({"bf16": original} | decoded, tokenizer, args, bar)
    evaluations = [
        evaluation(
            name, model, original, qualities[name], floats=torch.bfloat16, rows=counted_as(report.rows, torch.bfloat16)
        )
        for name, (model, report) in models.items()
    ]
    console.print(result_table(evaluations), "", text_table(texts, args.prompt), sep="\n")
    for line in insane(evaluations):
        console.print(f"[bold red]not as expected:[/] {line}")
    html = args.out / "report.html"
    writes = {name: one.text for name, one in texts.items()}
    html.write_text(
        page(evaluations, title=TITLE, caption=CAPTION, facts=facts, texts=writes, prompt=args.prompt), encoding="utf-8"
    )
    pictures = [args.out / "demo.png"] + ([ROOT / "docs" / "img" / "demo.png"] if args.record else [])
    for path in pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(evaluations, TITLE, f"{facts['model']}; {facts['text']}. {CAPTION}", str(path))
    if args.record:
        record(evaluations, ROOT / "benchmarks" / "results" / "quality.csv", args)
    command_line(args, args.out)
    console.print(
        f"\nreport: {os.path.relpath(html)}   picture: {os.path.relpath(pictures[0])}   {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
