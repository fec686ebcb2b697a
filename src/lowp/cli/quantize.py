"""`lowp quantize`: a checkpoint in floats becomes one in few bits, without ever being in memory whole.

    lowp quantize MODEL_DIR --to int4 --out DIR
    lowp quantize MODEL_DIR --to int4 --rule 'lm_head=none' --rule '*.down_proj=int8' --method hqq --out DIR

    lowp quantize MODEL_DIR --to int4 --method rotate+gptq --data text.txt --max-ram 8GB --out DIR

The plan is that of `lowp.quantize_`, made on a model without numbers; the work is `lowp.quantize.stream`, with `--data` that of
`lowp.quantize.calibrate_files`. Rules come before `--to`, in the order given. Ctrl-C keeps what is done in `.DIR.partial`; the
same command again goes on from there.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from .app import Device, Json, device_of, print_json, progress_console, read_text, show, size, table

Model = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", show_default=False, help="A Hugging Face checkpoint in floats.")
]
To = Annotated[
    str,
    typer.Option(
        "--to",
        show_default=False,
        help="Scheme or preset for every layer that multiplies: int4, fp8, int4/1x64*bf16 ...",
    ),
]
Out = Annotated[str, typer.Option("--out", show_default=False, help="The directory to write; it must not exist.")]
Rule = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="PATTERN=SCHEME",
        show_default=False,
        help="A rule that comes before --to; PATTERN=none keeps. May be repeated.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method", help="How the numbers are chosen: absmax, mse, hqq; with --data gptq, awq, rotate+gptq ..."
    ),
]
Data = Annotated[
    str, typer.Option("--data", metavar="FILE", show_default=False, help="A text to calibrate on, in UTF-8.")
]
Samples = Annotated[int, typer.Option("--samples", help="Sequences of the text to calibrate on.")]
Length = Annotated[int, typer.Option("--length", help="Tokens in each.")]
Static = Annotated[
    str,
    typer.Option(
        "--static", show_default=False, help="Static scales of activations: minmax, average, percentile, mse."
    ),
]
Propagate = Annotated[str, typer.Option("--propagate", help="What a block sees of those before it: quantized, float.")]
MaxRam = Annotated[str, typer.Option("--max-ram", show_default=False, help="Memory the process may use, such as 8GB.")]
MaxVram = Annotated[str, typer.Option("--max-vram", show_default=False, help="The same on the GPU.")]
OnMisfit = Annotated[
    str, typer.Option("--on-misfit", help="What a layer that cannot take its scheme does: error, skip.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a lowp checkpoint that is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
ShardSize = Annotated[float, typer.Option("--shard-gb", help="The largest size of one file.")]


def quantize(
    model_dir: Model,
    to: To,
    out: Out = "",
    rule: Rule = None,
    method: Method = "absmax",
    on_misfit: OnMisfit = "error",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    shard_gb: ShardSize = 4.0,
    data: Data = "",
    samples: Samples = 128,
    length: Length = 512,
    static: Static = "",
    propagate: Propagate = "quantized",
    max_ram: MaxRam = "",
    max_vram: MaxVram = "",
    json: Json = False,
) -> None:
    """Quantize a checkpoint, tensor by tensor; with --data block by block."""
    from ..errors import QuantizedError, SpellingError
    from ..integrations import transformers
    from ..quantize import plan
    from ..quantize.checkpoint import check_target, is_ours
    from ..quantize.shards import read_directory

    where, rules = device_of(device), rules_of(rule or [], to)
    if not out and not dry_run:
        raise SpellingError(
            "--out wants the directory to write, got none: add --out DIR, or --dry-run to see the plan."
        )
    if shard_gb <= 0:
        raise SpellingError(f"--shard-gb wants a positive number, got {shard_gb}.")
    stored = read_directory(model_dir)
    if is_ours(model_dir):
        raise QuantizedError(f"{model_dir} is quantized already: name the checkpoint in floats that it was made from.")
    if out:
        check_target(out, overwrite)
    model = transformers.empty_model(model_dir)
    sources, tied, unknown = transformers.sources(model, stored)
    planned = plan(model, rules, method=method, device=where, on_misfit=on_misfit)
    if dry_run:
        _show_plan(planned, json)
        return
    if data:
        how = _how(method, where, static, propagate, max_ram, max_vram)
        texts = _sequences(model_dir, data, samples, length)
        report = _calibrate(model, sources, rules, model_dir, out, tied, texts, how, on_misfit, overwrite, quiet=json)
    else:
        _check_without_data(method, static)
        report = _run(sources, planned, model_dir, out, tied, method, where, overwrite, int(shard_gb * 1e9), quiet=json)
    if json:
        print_json(
            report.to_dict() | {"out": out, "left_out": unknown, "groups": [g.to_json() for g in groups(report)]}
        )
        return
    show(*_tables(report, unknown, out))


def rules_of(spelled: Sequence[str], to: str) -> dict[str, str | None]:
    """The rules of repeated --rule options, in order, and then `--to` for everything else.

    >>> rules_of(["lm_head=none"], "int4")
    {'lm_head': None, '*': 'int4'}
    """
    from ..errors import SpellingError

    rules: dict[str, str | None] = {}
    for one in spelled:
        pattern, separator, scheme = one.rpartition("=")
        if not separator or not pattern or not scheme:
            raise SpellingError(
                f"--rule wants PATTERN=SCHEME, such as 'lm_head=none' or '*.down_proj=int8', got {one!r}."
            )
        rules[pattern] = None if scheme.lower() == "none" else scheme
    return rules if "*" in rules else rules | {"*": to}


def _run(
    sources: Any,
    planned: Any,
    model_dir: str,
    out: str,
    tied: Any,
    method: str,
    device: Any,
    overwrite: bool,
    shard_bytes: int,
    *,
    quiet: bool,
) -> Any:
    """The work, under a progress bar; Ctrl-C says how to go on."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from ..quantize.stream import quantize_files

    columns = (
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    console = progress_console()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("quantize", total=None, name="")

        def progress(name: str, done: int, total: int) -> None:
            if name:
                bar.update(task, completed=done, total=total, name=name)
            else:  # what an earlier run has done tells nothing about the rate of this one
                bar.reset(task, completed=done, total=total)

        with _resumable(out):
            return quantize_files(
                sources, planned, out, tied=tied, method=method, device=device, config_from=model_dir,
                overwrite=overwrite, shard_bytes=shard_bytes, progress=progress,
            )  # fmt: skip


# -- with data --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _resumable(out: str) -> Iterator[None]:
    """Ctrl-C says where the unfinished work lies."""
    from ..quantize.stream import work_directory

    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"What is done lies in {work_directory(out)}: the same command goes on from there; remove it to give up."
        ) from None


def _check_without_data(method: str, static: str) -> None:
    from ..errors import SpellingError
    from ..quantize.method import method_of

    chosen = method_of(method)
    if chosen.wants_data or chosen.edit is not None or static:
        what = "--static" if static else f"--method {method}"
        raise SpellingError(f"{what} wants --data FILE, a text to calibrate on: got none.")


def _how(method: str, device: Any, static: str, propagate: str, max_ram: str, max_vram: str) -> Any:
    from ..quantize.calibrate import How
    from ..quantize.memory import bytes_of
    from ..quantize.method import method_of

    ram, vram = bytes_of(max_ram or None, "--max-ram"), bytes_of(max_vram or None, "--max-vram")
    how = How(
        method=method_of(method), device=device, home=device, static=static or None, propagate=propagate,
        limit=ram if device.type == "cpu" else vram,
    )  # fmt: skip
    how.check()
    return how


def _sequences(model_dir: str, data: str, samples: int, length: int) -> Any:
    """The text's sequences, as the model's tokenizer reads it."""
    from ..integrations import transformers
    from ..quantize.data import sequences
    from ..report.evaluate import tokens_of

    return sequences(tokens_of(transformers.tokenizer(model_dir), read_text(data)), samples, length)


def _calibrate(
    model: Any,
    sources: Any,
    rules: Any,
    model_dir: str,
    out: str,
    tied: Any,
    texts: Any,
    how: Any,
    on_misfit: str,
    overwrite: bool,
    *,
    quiet: bool,
) -> Any:
    """The work block by block, under a progress bar with the time that is left."""
    import dataclasses

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..quantize.calibrate_files import calibrate_files

    columns = (
        MofNCompleteColumn(), TextColumn("blocks"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )  # fmt: skip
    console = progress_console()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("calibrate", total=None, name="")

        def progress(name: str, done: int, total: int) -> None:
            if bar.tasks[task].total is None:  # what an earlier run has done tells nothing about the rate of this one
                bar.reset(task, completed=done, total=total)
            bar.update(task, completed=done, total=total, name=name)

        with _resumable(out):
            return calibrate_files(
                model, sources, rules, out, batches=texts, how=dataclasses.replace(how, progress=progress), tied=tied,
                on_misfit=on_misfit, config_from=model_dir, overwrite=overwrite,
            )  # fmt: skip


# -- what is shown ----------------------------------------------------------------------------------------------------


class Group:
    """The rows of a report that share a scheme, a kernel and a reason."""

    def __init__(self, scheme: str | None, kernel: str, why: str, rows: list[Any]) -> None:
        self.scheme, self.kernel, self.why, self.rows = scheme, kernel, why, rows

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        errors = [row.error for row in self.rows]
        before, after = (
            [error for row in self.rows if not math.isnan(error := getattr(row, name))]
            for name in ("rounding_error", "output_error")
        )
        return {
            "scheme": self.scheme,
            "kernel": self.kernel,
            "why": self.why,
            "tensors": len(self.rows),
            "bytes_before": sum(row.bytes_before for row in self.rows),
            "bytes_after": sum(row.bytes_after for row in self.rows),
            "mean_error": sum(errors) / len(errors),
            "mean_rounding_error": sum(before) / len(before) if before else None,
            "mean_output_error": sum(after) / len(after) if after else None,
            "names": [row.fqn for row in self.rows],
        }


def groups(report: Any) -> list[Group]:
    """The rows of a report by scheme, kernel and reason, those that were quantized first."""
    found: dict[tuple[str | None, str, str], list[Any]] = defaultdict(list)
    for row in report.rows:
        found[row.scheme, row.kernel, row.why].append(row)
    made = [Group(scheme, kernel, why, rows) for (scheme, kernel, why), rows in found.items()]
    return sorted(made, key=lambda group: (group.scheme is None, group.scheme or "", -len(group.rows)))


def _tables(report: Any, unknown: list[str], out: str) -> list[Any]:
    made = table(
        f"{out}",
        "scheme",
        "tensors",
        "before",
        "after",
        "mean error",
        "kernel",
        "why",
        right=("tensors", "before", "after", "mean error"),
    )
    for group in groups(report):
        values = group.to_json()
        error = f"{values['mean_error']:.4f}" if group.scheme else ""
        if values["mean_output_error"] is not None:
            error += f"; of outputs {values['mean_rounding_error']:.4f} -> {values['mean_output_error']:.4f}"
        why = group.why if len(group.rows) > 1 else f"{group.rows[0].fqn}: {group.why}"
        sizes = size(values["bytes_before"]), size(values["bytes_after"])
        made.add_row(group.scheme or "stays", str(len(group.rows)), *sizes, error, group.kernel, why)
    ratio = report.bytes_after / max(report.bytes_before, 1)
    lines = [made, f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({ratio:.3f} of it)"]
    if unknown:
        lines.append(
            f"left out, because the model has no such tensor: {', '.join(unknown[:8])}{' ...' if len(unknown) > 8 else ''}"
        )
    return lines


def _show_plan(planned: Any, json: bool) -> None:
    import dataclasses

    if json:
        rows = [dataclasses.asdict(row) | {"dtype": str(row.dtype).removeprefix("torch.")} for row in planned.rows]
        print_json({"rows": rows})
        return
    made = table("plan", "tensor", "shape", "scheme", "layout", "kernel", "why")
    for row in planned.rows:
        made.add_row(row.fqn, "x".join(map(str, row.shape)), row.scheme or "stays", row.layout, row.kernel, row.why)
    show(made)


COMMANDS = {"quantize": quantize}
