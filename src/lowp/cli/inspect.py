"""`lowp inspect`: what a checkpoint holds, ours or a plain one of Hugging Face's.

    lowp inspect DIR             tensors that differ only in a number (the layers) in one line
    lowp inspect DIR --all       every tensor in a line of its own

Only headers are read, and unless --no-verify each file's SHA-256 where it is known.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .app import Directory, Json, print_json, show, size, table

Every = Annotated[bool, typer.Option("--all", help="A line for every tensor.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every file with its SHA-256.")]


def inspect(directory: Directory, every: Every = False, verify: Verify = True, json: Json = False) -> None:
    """Tensors, schemes, bytes and totals of a checkpoint."""
    from ..quantize.checkpoint import is_ours, read_contents
    from ..quantize.shards import read_directory

    if is_ours(directory):
        contents = read_contents(directory, verify=verify)
        rows, tied = _ours(contents), contents.tied
        checked = f"{len(contents.files)} files, {'SHA-256 as recorded' if verify else 'SHA-256 not compared'}"
    else:
        rows, tied = [_plain(name, stored) for name, stored in read_directory(directory).items()], {}
        checked = "a checkpoint without lowp.json: nothing to compare the files with"
    totals = {
        "tensors": len(rows),
        "parameters": sum(r["parameters"] for r in rows),
        "bytes": sum(r["bytes"] for r in rows),
    }
    if json:
        print_json(
            {"directory": directory, "tensors": rows, "tied": tied, "schemes": _by_scheme(rows), "total": totals}
        )
        return
    show(
        _tensor_table(directory, rows if every else _folded(rows)), _scheme_table(rows), *_lines(totals, tied, checked)
    )


def _ours(contents: Any) -> list[dict[str, Any]]:
    rows = [_plain(name, stored) for name, stored in contents.plain().items()]
    for name, meaning in contents.meanings.items():
        count = math.prod(meaning.shape)
        held = sum(stored.nbytes for stored in contents.parts(name).values())
        rows.append(_row(name, meaning.shape, meaning.scheme, count, held))
    return sorted(rows, key=lambda row: _natural(row["name"]))


def _plain(name: str, stored: Any) -> dict[str, Any]:
    dtype = str(stored.dtype).removeprefix("torch.")
    return _row(name, stored.shape, dtype, math.prod(stored.shape), stored.nbytes)


def _row(name: str, shape: Sequence[int], scheme: str, parameters: int, held: int) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "scheme": scheme, "parameters": parameters, "bytes": held}


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors whose names differ only in numbers, in one row each shape and scheme."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[re.sub(r"\b\d+\b", "*", row["name"]), str(row["shape"]), row["scheme"]].append(row)
    return [
        rows[0] | {"name": name if len(rows) > 1 else rows[0]["name"], "count": len(rows), **_sums(rows)}
        for (name, _, _), rows in found.items()
    ]


def _sums(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {"parameters": sum(row["parameters"] for row in rows), "bytes": sum(row["bytes"] for row in rows)}


def _by_scheme(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["scheme"]].append(row)
    return {scheme: {"tensors": len(rows), **_sums(rows)} for scheme, rows in sorted(found.items())}


def _tensor_table(directory: str, rows: list[dict[str, Any]]) -> Any:
    made = table(
        directory, "tensor", "count", "shape", "scheme", "bytes", "bits each", right=("count", "bytes", "bits each")
    )
    for row in rows:
        sizes = "x".join(map(str, row["shape"])) or "scalar"
        made.add_row(row["name"], str(row.get("count", 1)), sizes, row["scheme"], size(row["bytes"]), _bits(row))
    return made


def _scheme_table(rows: list[dict[str, Any]]) -> Any:
    made = table(
        "by scheme",
        "scheme",
        "tensors",
        "parameters",
        "bytes",
        "bits each",
        right=("tensors", "parameters", "bytes", "bits each"),
    )
    for scheme, sums in _by_scheme(rows).items():
        made.add_row(scheme, str(sums["tensors"]), f"{sums['parameters']:,}", size(sums["bytes"]), _bits(sums))
    return made


def _bits(row: dict[str, Any]) -> str:
    return f"{8 * row['bytes'] / row['parameters']:.3f}" if row["parameters"] else ""


def _lines(totals: dict[str, int], tied: dict[str, str], checked: str) -> list[str]:
    each = f", {_bits(totals)} bits each" if totals["parameters"] else ""
    lines = [
        f"{totals['tensors']} tensors, {totals['parameters']:,} parameters, {size(totals['bytes'])}{each}; {checked}"
    ]
    return lines + [f"{name} is {other}" for name, other in tied.items()]


COMMANDS = {"inspect": inspect}
