"""`lowp bench`: how fast the kernels of this machine are, beside torch's float op, in one run.

    lowp bench                                                         linear, a few formats, 4096x4096
    lowp bench linear --schemes int4,int8 --shapes 4096x4096,14336x4096 --batch 1,16,256 --device cuda
    lowp bench linear --schemes int4 --every --csv results.csv         every kernel that can run, rows appended
    lowp bench linear --shapes llama3-8b,qwen3-32b --schemes int4,fp8-dynamic --batch 1..8192 --device cuda --plot speed.png

A model's name stands for the shapes of its linear layers, and 1..8192 for the powers of two from 1 to 8192. On CUDA the time is
that of a graph's replay, with weights that come from memory; beside it stands the limit that the card's bandwidth and products
allow. A kernel's result is compared with the reference first. One that is wrong, or raises, gets no time; the others go on, and
the command ends with exit code 2.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Device, Dtype, Json, device_of, dtype_of, print_json, progress_console, show, table

if TYPE_CHECKING:
    from ..report.bench import Timing

Op = Annotated[str, typer.Argument(help="linear, matmul or embedding.")]
Schemes = Annotated[str, typer.Option("--schemes", help="Schemes or presets, separated by commas.")]
Shapes = Annotated[
    str,
    typer.Option("--shapes", help="Shapes of the weight, rows out x columns in, or models (llama3-8b), by commas."),
]
Batches = Annotated[str, typer.Option("--batch", help="Numbers of tokens by commas; 1..64 for powers of two.")]
Every = Annotated[bool, typer.Option("--every", help="Every kernel that can run, not only the one that is picked.")]
Csv = Annotated[str, typer.Option("--csv", metavar="FILE", help="Append the rows to this file.")]
Plot = Annotated[str, typer.Option("--plot", metavar="FILE", help="Draw speed over bf16 against M: a PNG, SVG or PDF.")]
Brief = Annotated[bool, typer.Option("--brief", help="Print the smallest speeds alone, not every case.")]


def bench(
    op: Op = "linear",
    schemes: Schemes = "int8,int8_dynamic,int4,fp8",
    shapes: Shapes = "4096x4096",
    batch: Batches = "1,16,256",
    device: Device = "cpu",
    dtype: Dtype = "bf16",
    every: Every = False,
    csv: Csv = "",
    plot: Plot = "",
    brief: Brief = False,
    json: Json = False,
) -> None:
    """Median time of each kernel and its ratio to torch's float op."""
    from ..errors import KernelError
    from ..numerics import Scheme
    from ..report.bench import sweep
    from ..report.clock import limits, lost
    from ..report.plots import speed_by_batch
    from ..report.results import append, device_name

    where, floats = str(device_of(device)), dtype_of(dtype)
    names = [str(Scheme.parse(name)) for name in schemes.split(",")]
    sizes, batches = shapes_of(shapes), batches_of(batch)
    notes, found, start, known = progress_console(), [], time.perf_counter(), limits(where)
    with notes.status("") as status:
        for shape in sizes:
            part = []
            for one in sweep(op, names, [shape], batches, device=where, dtype=floats, every=every, limits=known):
                status.update(f"{op} {one.scheme} {shape[0]}x{shape[1]}, batch {one.batch}")
                part.append(one)
            if csv:  # after each shape: what is measured is kept, whatever comes later
                append(csv, [one.to_row() for one in part if one.right])
            found += part
            if part and part[-1].failed and lost(where):
                break
    wrong = [one for one in found if not one.right]
    if not any(one.kernel for one in found):
        raise KernelError(f"{wrong[0].why_wrong()}.")
    if plot:
        speed_by_batch(found, f"{op}, {dtype} activations, {device_name(where)}", plot)
    if json:
        print_json([one.to_dict() for one in found])
    else:
        title = f"{op} on {device_name(where)}, {dtype} activations" + (f" (seen: {known})" if known else "")
        show(*([] if brief else [timing_table(found, title)]), slowest_table(found, title if brief else ""))
        show(*(one.why_wrong() for one in wrong[:20]))
        show(f"{len(found)} cases in {time.perf_counter() - start:.0f} s")
    if wrong:
        raise KernelError(
            f"{wrong[0].why_wrong()}. {len(wrong)} of {len(found)} cases got no time: wrong, or they raised."
        )


def timing_table(found: list[Timing], title: str) -> Any:
    """A line for each kernel and case; the columns that this device has figures for."""
    more: tuple[str, ...] = ()
    more += ("fp32", "times fp32's speed") if any(one.fp32_us for one in found) else ()
    more += ("limit", "times the limit") if any(one.limit_us for one in found) else ()
    numbers = ("batch", "time", "bf16", "times bf16's speed", *more, "error")
    made = table(title, "shape", "scheme", "kernel", *numbers, right=numbers)
    for one in found:
        case = ("x".join(map(str, one.shape)), one.scheme, one.kernel + ("*" if one.note else ""), str(one.batch))
        error = "" if one.failed else f"{one.error:.1e}"
        if one.us is None or one.bf16_us is None:
            made.add_row(*case, "failed" if one.failed else "wrong", *[""] * (2 + len(more)), error)
            continue
        cells = {
            "fp32": _time(one.fp32_us),
            "times fp32's speed": _ratio(one.fp32_us and one.fp32_us / one.us),
            "limit": _time(one.limit_us),
            "times the limit": _ratio(one.over_limit),
        }
        made.add_row(
            *case, _time(one.us), _time(one.bf16_us), _ratio(one.speed), *(cells[name] for name in more), error
        )
    notes = sorted({one.note for one in found if one.note})
    made.caption = f"* {'; '.join(notes)}" if notes else None
    return made


def slowest_table(found: list[Timing], title: str) -> Any:
    """For each scheme the smallest speed over bf16 and where that is, and how many cases lie below 0.97 of bf16's."""
    from ..report.bench import lines, slowest

    numbers = ("smallest speed", "batch", "below 0.97", "cases", "wrong")
    heading = f"{title}\n" if title else ""
    made = table(f"{heading}the smallest of times bf16's speed", "scheme", "kernel", "shape", *numbers, right=numbers)
    for line in lines(found).values():
        one = slowest(line)
        below = sum(other.speed is not None and other.speed < 0.97 for other in line)
        counts = str(below), str(len(line)), str(sum(not other.right for other in line))
        where = (one.kernel, "x".join(map(str, one.shape)), _ratio(one.speed), str(one.batch)) if one else ("",) * 4
        made.add_row(line[0].scheme, *where, *counts)
    return made


def _time(us: float | None) -> str:
    return "" if us is None else f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def shapes_of(spelled: str) -> list[tuple[int, int]]:
    """The shapes of spellings and models, each once.

    >>> shapes_of("128x64,llama3-8b")[:2]
    [(128, 64), (4096, 4096)]
    """
    from ..report.models import model_of

    found: dict[tuple[int, int], None] = {}
    for one in spelled.split(","):
        is_shape = one.strip()[:1].isdigit() or not one.strip()
        found |= dict.fromkeys([shape_of(one)] if is_shape else model_of(one.strip()).linears().values())
    return list(found)


def shape_of(spelled: str) -> tuple[int, int]:
    """The rows and columns of a spelling such as 4096x4096.

    >>> shape_of("128x64")
    (128, 64)
    """
    from ..errors import SpellingError

    rows, _, columns = spelled.strip().partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise SpellingError(f"--shapes wants rows x columns such as 4096x4096, got {spelled!r}.")
    return int(rows), int(columns)


def batches_of(spelled: str) -> list[int]:
    """Numbers of tokens, and the powers of two of ranges, each once.

    >>> batches_of("1..8,100")
    [1, 2, 4, 8, 100]
    """
    from ..errors import SpellingError

    found: dict[int, None] = {}
    for one in spelled.split(","):
        first, is_range, last = one.partition("..")
        if not is_range:
            found[count_of(one)] = None
            continue
        low, high = count_of(first), count_of(last)
        powers = [2**i for i in range(high.bit_length()) if low <= 2**i <= high]
        if not powers:
            raise SpellingError(f"--batch wants a range that holds a power of two, such as 1..256, got {one!r}.")
        found |= dict.fromkeys(powers)
    return list(found)


def count_of(spelled: str) -> int:
    """A positive number, or a SpellingError."""
    from ..errors import SpellingError

    if not spelled.strip().isdigit() or not int(spelled):
        raise SpellingError(f"--batch wants positive numbers such as 1,16,256 or 1..256, got {spelled!r}.")
    return int(spelled)


COMMANDS = {"bench": bench}
