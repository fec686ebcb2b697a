"""The frame of the command line: it finds the verbs, and treats errors, output and shared options alike in all of them.

A verb is a file beside this one:

    from .app import Device, Json, print_json, show

    def weigh(directory: Directory, device: Device = "cpu", json: Json = False) -> None:
        \"\"\"The help text of `lowp weigh`.\"\"\"
        ...
    COMMANDS = {"weigh": weigh}

Rules that hold for every verb:

    stdout     tables for a person, or with --json one JSON value and nothing else
    stderr     progress bars, warnings, errors
    exit code  0 done; 2 bad input (a LowpError or OSError: one sentence that says what to do, no traceback); 130 Ctrl-C
    --debug    added to every verb: lets the traceback through

A verb that imports torch models or other heavy packages does so inside its function: `lowp --help` stays quick.
"""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import json
import os
import pkgutil
import shutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..errors import LowpError, MisfitError, SpellingError
from ..ops import device_of as device_of

Directory = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="A checkpoint's directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Float type of activations: bf16, fp16, fp32.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONG_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}


# -- the verbs --------------------------------------------------------------------------------------------------------


def build() -> typer.Typer:
    """The application with every verb of this folder."""
    app = typer.Typer(
        name="lowp",
        help="PyTorch models in few bits.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def lowp() -> None:
        """PyTorch models in few bits: quantize, inspect, measure, generate."""

    for name, function in sorted(commands().items()):
        app.command(name)(answering(name, function))
    return app


def commands() -> dict[str, Callable[..., None]]:
    """Every verb's name and function, found by listing this folder."""
    package = importlib.import_module(__package__)
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if info.name not in ("app", "__main__")]
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return {verb: function for module in modules for verb, function in getattr(module, "COMMANDS", {}).items()}


def answering(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """The verb with `--debug` added and its errors answered in one sentence."""
    hints = typing.get_type_hints(function, include_extras=True)
    given = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()]
    switch = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except BrokenPipeError:
            raise  # `lowp inspect DIR | head`: no error of ours
        except (LowpError, OSError, torch.OutOfMemoryError) as error:
            if debug:
                raise
            typer.echo(f"lowp {name}: {sentence(error)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            typer.echo(f"lowp {name}: stopped. {stop}".rstrip(), err=True)
            raise typer.Exit(130) from None

    del run.__wrapped__  # type: ignore[attr-defined]  # typer would read the signature without --debug
    run.__signature__ = inspect.Signature([*given, switch])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*given, switch)}
    return run


def sentence(error: BaseException) -> str:
    """What went wrong and what to do, on one line.

    >>> sentence(FileNotFoundError(2, "No such file or directory", "model"))
    'model: no such file or directory. Check the spelling of the path.'
    """
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split()) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    what = (error.strerror or type(error).__name__).lower()
    return f"{where}{what}. {_ADVICE.get(error.errno, 'Mend that and run again.')}"


_ADVICE = {
    errno.ENOENT: "Check the spelling of the path.",
    errno.ENOTDIR: "Name a directory.",
    errno.EACCES: "Change its permissions, or name another place.",
    errno.EROFS: "Name a place that can be written.",
    errno.ENOSPC: "Free some space, or write to another disk.",
    errno.EDQUOT: "Free some of your quota, or write to another disk.",
}


# -- options that verbs share -----------------------------------------------------------------------------------------


def dtype_of(name: str) -> torch.dtype:
    """The float type of a short or long spelling: bf16, bfloat16 ... or a SpellingError."""
    known = _DTYPES | _LONG_DTYPES
    if name not in known:
        raise SpellingError.of("dtype", name, known)
    return known[name]


# -- output -----------------------------------------------------------------------------------------------------------


def read_text(path: str) -> str:
    """A file's text.

    Raises:
        MisfitError: the file is no text in UTF-8. OSError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MisfitError(
            f"{path} wants to be a text in UTF-8, got other bytes at {error.start}: name another file."
        ) from None


def show(*renderables: Any) -> None:
    """Print tables and lines for a person to stdout."""
    stdout = Console(highlight=False, markup=False, width=_width(sys.stdout))
    for renderable in renderables:
        stdout.print(renderable)


def progress_console() -> Console:
    """The console on stderr, for progress bars and notes."""
    return Console(stderr=True, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print one JSON value to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table with these columns; those in `right` are aligned to the right.

    >>> table("bytes", "name", "bytes", right=("bytes",)).title
    'bytes'
    """
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def size(count: float) -> str:
    """Bytes for a person, in powers of ten.

    >>> size(1_234_567)
    '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _width(stream: Any) -> int | None:
    """A pipe has no width: wide enough that tables keep their lines."""
    if stream.isatty():
        return None
    return (
        int(os.environ["COLUMNS"])
        if os.environ.get("COLUMNS", "").isdigit()
        else max(shutil.get_terminal_size((160, 0))[0], 160)
    )
