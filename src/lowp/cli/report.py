"""`lowp report`: one HTML page about one or more quantized checkpoints of the same model.

    lowp report DIR... --against MODEL_DIR --text FILE --out report.html

Everything is in the page: summary, perplexity and KL against size, bytes and error by layer. Models are loaded one after the
other, so no more than two are in memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Device, Json, print_json, progress_console, show, size
from .eval import Against, DtypeOr, Outputs, Stride, TextFile, Tokens, Window, evaluated, prepared

if TYPE_CHECKING:
    from ..report import Evaluation

Directories = Annotated[list[str], typer.Argument(metavar="DIR...", show_default=False, help="Quantized checkpoints.")]
Page = Annotated[str, typer.Option("--out", help="The HTML file to write.")]


def report(
    directories: Directories,
    against: Against,
    text: TextFile,
    out: Page = "report.html",
    tokens: Tokens = 0,
    window: Window = 512,
    stride: Stride = 256,
    outputs: Outputs = False,
    device: Device = "cpu",
    dtype: DtypeOr = "",
    json: Json = False,
) -> None:
    """Write an HTML page that compares quantized checkpoints with their original."""
    from ..report.page import page
    from ..report.results import device_name

    _check_target(out)
    original, ids = prepared(against, text, tokens, window, stride, device, dtype)
    notes, found = progress_console(), []
    for directory, name in zip(directories, names_of(directories), strict=True):
        if not json:
            notes.print(f"{directory} ...")
        one = evaluated(directory, original, ids, device, dtype, window, stride, outputs=outputs, quiet=json)
        found.append(_named(one, name))
    facts = {
        "original": against,
        "text": f"{Path(text).name}, {len(ids) - 1} tokens, windows of {window} every {stride}",
        "device": device_name(device),
        "activations": str(next(original.parameters()).dtype).removeprefix("torch."),
    }
    html = page(found, title=f"{Path(against).resolve().name}, quantized", facts=facts)
    partial = Path(f"{out}.partial")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, out)
    if json:
        print_json({"out": out, "bytes": len(html.encode()), "models": [one.to_dict() for one in found]})
        return
    show(f"{out}: {len(found)} models, {size(len(html.encode()))}, nothing to fetch. Open it in a browser.")


def names_of(directories: list[str]) -> list[str]:
    """The last names of directories, or whole paths where these are not unique.

    >>> names_of(["out/int4", "out/int8"])
    ['int4', 'int8']
    """
    short = [Path(directory).resolve().name for directory in directories]
    return short if len(set(short)) == len(short) else directories


def _named(one: Evaluation, name: str) -> Evaluation:
    import dataclasses

    return dataclasses.replace(one, name=name)


def _check_target(out: str) -> None:
    """Find out before the work, not after it, that the page cannot be written."""
    from ..errors import LowpError

    target = Path(out)
    if target.is_dir():
        raise LowpError(f"--out wants a file, got the directory {out}: add a name, such as {target / 'report.html'}.")
    if not target.resolve().parent.is_dir():
        raise LowpError(f"--out {out}: its directory does not exist: make it first.")


COMMANDS = {"report": report}
