"""Rows of `benchmarks/results/<topic>.csv`: figures that can be compared between commits and machines.

Every file has the columns of `COLUMNS`, then its own (shape, batch, scheme ...):

    what       what was measured                    device   the processor's name
    value      the figure                           torch    its version
    unit       of value and baseline                commit   of this repository, "+" after it where files were changed
    baseline   the same figure of what it is        date     of the day, ISO
               compared with (the original model,
               torch's float op)
    ratio      value / baseline

Rows are appended, never rewritten: a file is a history.
"""

from __future__ import annotations

import csv
import datetime
import functools
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import MisfitError

COLUMNS = ("what", "value", "unit", "baseline", "ratio", "device", "torch", "commit", "date")


def row(
    what: str, value: float, unit: str, baseline: float | None = None, *, device: str = "cpu", **more: Any
) -> dict[str, Any]:
    """One row: the house's columns, then `more`.

    >>> row("perplexity", 11.0, "perplexity", 10.0, scheme="int4/row")["ratio"]
    1.1
    """
    return {
        "what": what,
        "value": _short(value),
        "unit": unit,
        "baseline": "" if baseline is None else _short(baseline),
        "ratio": "" if not baseline else _short(value / baseline),
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        **more,
    }


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def append(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a file, which is made with its header where it is missing; returns how many.

    Raises:
        MisfitError: the file has other columns.
    """
    rows, path = list(rows), Path(path)
    if not rows:
        return 0
    columns = list(rows[0])
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise MisfitError(
                f"{path} has the columns {', '.join(found)}, the rows {', '.join(columns)}: name another file."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: tuples become lists, what is not finite becomes None.

    >>> plain({"a": (1.0, float("inf"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def device_name(device: str | torch.device) -> str:
    """The name of a processor: of the GPU, or of the CPU with the number of threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu()}, {torch.get_num_threads()} threads"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The commit that this code is at, "+" after it where tracked files were changed; "" outside a repository.
    Asked once in a process: thousands of rows are written by one sweep."""

    def git(*words: str) -> str:
        ran = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", "--", ":/src") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
