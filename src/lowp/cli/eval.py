"""`lowp eval`: what a quantized checkpoint lost against the model it came from, on a text.

    lowp eval DIR --against MODEL_DIR --text FILE
    lowp eval DIR --against MODEL_DIR --text FILE --tokens 8192 --outputs --all

Perplexity, KL to the original, top-1 agreement, bytes, and the error of each layer; the definitions are at the top of
`lowp.report.evaluate`. Both models run on the same tokens, a batch of windows at a time, through the kernels that would serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import (
    Device,
    Directory,
    Json,
    device_of,
    dtype_of,
    print_json,
    progress_console,
    read_text,
    show,
    size,
    table,
)

if TYPE_CHECKING:
    import torch

    from ..report import Evaluation

Against = Annotated[
    str, typer.Option("--against", metavar="MODEL_DIR", show_default=False, help="The checkpoint it was made from.")
]
TextFile = Annotated[str, typer.Option("--text", metavar="FILE", show_default=False, help="A text in UTF-8.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Read only the first tokens of the text; 0 for all.")]
Window = Annotated[int, typer.Option("--window", help="Tokens that are read together.")]
Stride = Annotated[int, typer.Option("--stride", help="Tokens between the starts of two windows.")]
Outputs = Annotated[bool, typer.Option("--outputs", help="Also the error of each layer's output, on 2048 tokens.")]
Every = Annotated[bool, typer.Option("--all", help="A line for every layer.")]
DtypeOr = Annotated[
    str, typer.Option("--dtype", help="Float type of activations: bf16, fp16, fp32; as stored if absent.")
]

OUTPUT_TOKENS = 2048  # enough for a stable mean of squares, few enough to wait for


def evaluate(
    directory: Directory,
    against: Against,
    text: TextFile,
    tokens: Tokens = 0,
    window: Window = 512,
    stride: Stride = 256,
    outputs: Outputs = False,
    every: Every = False,
    device: Device = "cpu",
    dtype: DtypeOr = "",
    json: Json = False,
) -> None:
    """Perplexity, KL, top-1 agreement and error by layer, against the original."""
    original, ids = prepared(against, text, tokens, window, stride, device, dtype)
    one = evaluated(directory, original, ids, device, dtype, window, stride, outputs=outputs, quiet=json)
    if json:
        print_json(one.to_dict() | {"against": against, "text": text, "window": window, "stride": stride})
        return
    show(layer_table(one) if every else group_table(one), summary_table(directory, one))


def prepared(
    against: str, text: str, tokens: int, window: int, stride: int, device: str, dtype: str
) -> tuple[Any, torch.Tensor]:
    """The original model and the text's token ids.

    Raises:
        MisfitError: the file is no text, or too short. OSError: it cannot be read.
    """
    from ..errors import MisfitError
    from ..integrations import transformers as hf
    from ..report import tokens_of
    from ..report.evaluate import check_windows

    check_windows(window, stride)
    if tokens < 0:
        raise MisfitError(f"--tokens wants a number of tokens, or 0 for the whole text, got {tokens}.")
    ids = tokens_of(hf.tokenizer(against), read_text(text), tokens or None)
    return load(against, device, dtype), ids


def load(directory: str, device: str, dtype: str) -> Any:
    """The model of a directory, without transformers' own progress bar."""
    where, floats = device_of(device), dtype_of(dtype) if dtype else None
    from ..integrations import transformers as hf

    hf.configuration(directory)  # what is wrong with a directory is found before transformers is asked
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return hf.load(directory, device=where, dtype=floats)
    finally:
        if shown:
            logging.enable_progress_bar()


def evaluated(
    directory: str,
    original: Any,
    ids: torch.Tensor,
    device: str,
    dtype: str,
    window: int,
    stride: int,
    *,
    outputs: bool,
    quiet: bool,
) -> Evaluation:
    """Load a quantized checkpoint and measure it, under a progress bar."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..report import evaluation, measure
    from ..report.layers import output_errors

    model = load(directory, device, dtype)
    columns = (
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=progress_console(), disable=quiet, transient=True) as bar:
        task = bar.add_task("measure", total=len(ids) - 1, note=f"{len(ids) - 1} tokens")
        quality = measure(
            original,
            {directory: model},
            ids,
            window=window,
            stride=stride,
            on_batch=lambda done, total: bar.update(task, completed=done),
        )[directory]
        bar.update(task, note="each layer")
        errors = output_errors(model, original, ids[:OUTPUT_TOKENS], window=window) if outputs else {}
    floats = original.config.dtype
    return evaluation(directory, model, original, quality, floats=floats, output_errors=errors)


# -- what is shown ----------------------------------------------------------------------------------------------------


def summary_table(directory: str, one: Evaluation) -> Any:
    """The figures of the whole model."""
    q = one.quality
    made = table(directory, "", "original", "quantized", "", right=("original", "quantized"))
    ratio = f"{one.bytes_before / one.bytes_after:.2f} x smaller"
    made.add_row("bytes", size(one.bytes_before), size(one.bytes_after), ratio)
    made.add_row("perplexity", f"{q.original_perplexity:.4f}", f"{q.perplexity:.4f}", f"{100 * (q.ratio - 1):+.2f} %")
    made.add_row("KL to the original", "", f"{q.kl:.5f}", "nats a token")
    made.add_row("same top token", "", f"{100 * q.top1:.2f} %", f"of {q.tokens} tokens")
    if one.scheme:
        made.add_row("bits a quantized weight", "", f"{one.bits:.3f}", one.scheme)
    return made


def group_table(one: Evaluation) -> Any:
    """The layers that share a scheme and a kernel in one line, with the one that lost most."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in one.rows:
        groups.setdefault((row.scheme or "stays", row.kernel, row.why), []).append(row)
    numbers = ("tensors", "before", "after", "mean error", "largest")
    made = table("layers", "scheme", *numbers, "in", "kernel", "why", right=numbers)
    for (scheme, kernel, why), rows in groups.items():
        worst = max(rows, key=lambda row: row.error)
        sizes = size(sum(row.bytes_before for row in rows)), size(sum(row.bytes_after for row in rows))
        mean = sum(row.error for row in rows) / len(rows)
        errors = (f"{mean:.4f}", f"{worst.error:.4f}", worst.fqn) if scheme != "stays" else ("", "", "")
        made.add_row(scheme, str(len(rows)), *sizes, *errors, kernel, why)
    if one.output_errors:
        name = max(one.output_errors, key=lambda name: one.output_errors[name])
        made.caption = f"largest output error: {one.output_errors[name]:.4f}, in {name}"
    return made


def layer_table(one: Evaluation) -> Any:
    """A line for each layer."""
    names = ["tensor", "scheme", "kernel", "before", "after", "weight error"]
    made = table(
        "layers",
        *names,
        *(["output error"] if one.output_errors else []),
        "why",
        right=("before", "after", "weight error", "output error"),
    )
    for row in one.rows:
        cells = [row.fqn, row.scheme or "stays", row.kernel, size(row.bytes_before), size(row.bytes_after)]
        cells.append(f"{row.error:.4f}" if row.scheme else "")
        if one.output_errors:
            error = one.output_errors.get(row.fqn.rpartition(".")[0])
            cells.append("" if error is None else f"{error:.4f}")
        made.add_row(*cells, row.why)
    return made


COMMANDS = {"eval": evaluate}
