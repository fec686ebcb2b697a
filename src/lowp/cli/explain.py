"""`lowp explain`: why a kernel runs, or does not.

    lowp explain linear int4/1x128 --device cuda --dtype bf16 --shape 4096x4096

prints every kernel of the op in the order in which they are tried, with "can run" and how (what is native to the device, what is
emulated) or one sentence why not, and marks the one that is picked. Without arguments it lists what there is to ask about: ops,
presets, formats.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from .app import Device, Dtype, Json, device_of, dtype_of, print_json, show, table

Op = Annotated[str | None, typer.Argument(show_default=False, help="linear, matmul, embedding ...")]
SchemeName = Annotated[
    str | None,
    typer.Argument(metavar="SCHEME", show_default=False, help="A scheme or preset, such as int4/1x128*bf16."),
]
Shape = Annotated[str, typer.Option("--shape", help="Shape of the weight, such as 4096x4096: rows out, columns in.")]


def explain(
    op: Op = None,
    scheme: SchemeName = None,
    device: Device = "cpu",
    dtype: Dtype = "bf16",
    shape: Shape = "4096x4096",
    json: Json = False,
) -> None:
    """Every kernel for an op and a scheme: can run, or why not. Without arguments: all ops, presets and formats."""
    if op is None or scheme is None:
        _list(op, json)
        return
    from ..numerics import Scheme
    from ..ops import explain as verdicts_of

    spelled, sizes = str(Scheme.parse(scheme)), shape_of(shape)
    rows = verdicts_of(_known_op(op), spelled, device=str(device_of(device)), dtype=dtype_of(dtype), shape=sizes)
    if json:
        print_json(
            {
                "op": op,
                "scheme": spelled,
                "device": device,
                "dtype": dtype,
                "shape": sizes,
                "kernels": [_record(v) for v in rows],
            }
        )
        return
    made = table(
        f"{op} {spelled} {'x'.join(map(str, sizes))} {dtype} on {device}",
        "",
        "kernel",
        "rank",
        "layout",
        "verdict",
        right=("rank",),
    )
    for verdict in rows:
        kernel, can = verdict.kernel, "can run (fallback: correct, not fast)" if verdict.kernel.fallback else "can run"
        answer = verdict.why_not or (f"{can}; {verdict.how}" if verdict.how else can)
        made.add_row("*" if verdict.chosen else "", kernel.name, str(kernel.rank), kernel.layout or "any", answer)
    show(made, "* runs: the first that can, in order of rank")


def shape_of(spelling: str) -> tuple[int, ...]:
    """The sizes of a spelling such as 4096x4096, 8,64,64 or 512; anything else is a SpellingError.

    >>> shape_of("8x64")
    (8, 64)
    """
    from ..errors import SpellingError

    sizes = re.split(r"[x,]", spelling.strip())
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise SpellingError(f"--shape wants positive sizes such as 4096x4096, got {spelling!r}.")
    return tuple(int(size) for size in sizes)


def _record(verdict: Any) -> dict[str, Any]:
    kernel = verdict.kernel
    return {
        "kernel": kernel.name,
        "rank": kernel.rank,
        "layout": kernel.layout or "any",
        "can_run": not verdict.why_not,
        "why_not": verdict.why_not,
        "how": verdict.how,
        "chosen": verdict.chosen,
        "fallback": kernel.fallback,
        "about": kernel.about,
    }


def _known_op(op: str) -> str:
    from ..errors import SpellingError
    from ..ops import kernels_of

    if not kernels_of(op):
        raise SpellingError.of("op", op, ops())
    return op


def ops() -> tuple[str, ...]:
    """The names of the ops that have kernels: the functions that floor 2 offers, asked one by one."""
    from .. import ops as floor
    from ..ops import kernels_of

    return tuple(name for name in floor.__all__ if kernels_of(name))


def _list(op: str | None, json: bool) -> None:
    from ..numerics import PRESETS, known_formats
    from ..ops import kernels_of

    shown = ops() if op is None else (_known_op(op),)
    kernels = {name: [kernel.name for kernel in kernels_of(name)] for name in shown}
    presets = {name.lower(): spelling for name, spelling in PRESETS.items()}
    if json:
        formats = [
            {"spelling": known.spelling, "about": known.about, "source": known.source} for known in known_formats()
        ]
        print_json({"ops": kernels, "presets": presets, "formats": formats})
        return
    ops_table = table("ops", "op", "kernels, in the order in which they are tried")
    for name, names in kernels.items():
        ops_table.add_row(name, ", ".join(names))
    formats_table = table("formats", "preset", "scheme", "about")
    for known in known_formats():
        formats_table.add_row(known.preset.lower(), known.spelling, known.about)
    show(
        ops_table,
        formats_table,
        "lowp explain OP SCHEME [--device cuda] [--dtype bf16] [--shape 4096x4096] asks about one case",
    )


COMMANDS = {"explain": explain}
