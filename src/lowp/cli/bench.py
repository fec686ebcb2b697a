"""`lowp bench`: how fast the kernels of this machine are, beside torch's float op, in one run.

    lowp bench                                                         linear, a few formats, 4096x4096
    lowp bench linear --schemes int4,int8 --shapes 4096x4096,14336x4096 --batch 1,16,256 --device cuda
    lowp bench linear --schemes int4 --every --csv results.csv         every kernel that can run, rows appended

A kernel's result is compared with the reference first; one that is wrong gets no time, and the command ends with exit code 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Device, Dtype, Json, device_of, dtype_of, print_json, progress_console, show, table

if TYPE_CHECKING:
    from ..report.bench import Timing

Op = Annotated[str, typer.Argument(help="linear, matmul or embedding.")]
Schemes = Annotated[str, typer.Option("--schemes", help="Schemes or presets, separated by commas.")]
Shapes = Annotated[str, typer.Option("--shapes", help="Shapes of the weight, rows out x columns in, by commas.")]
Batches = Annotated[str, typer.Option("--batch", help="Numbers of tokens, separated by commas.")]
Every = Annotated[bool, typer.Option("--every", help="Every kernel that can run, not only the one that is picked.")]
Csv = Annotated[str, typer.Option("--csv", metavar="FILE", help="Append the rows to this file.")]


def bench(
    op: Op = "linear",
    schemes: Schemes = "int8,int8_dynamic,int4,fp8",
    shapes: Shapes = "4096x4096",
    batch: Batches = "1,16,256",
    device: Device = "cpu",
    dtype: Dtype = "bf16",
    every: Every = False,
    csv: Csv = "",
    json: Json = False,
) -> None:
    """Median time of each kernel and its ratio to torch's float op."""
    from ..errors import KernelError
    from ..numerics import Scheme
    from ..report.bench import bench as timings_of
    from ..report.results import append, device_name

    where, floats = str(device_of(device)), dtype_of(dtype)
    names = [str(Scheme.parse(name)) for name in schemes.split(",")]
    sizes, batches = [shape_of(one) for one in shapes.split(",")], [count_of(one) for one in batch.split(",")]
    notes, found = progress_console(), []
    with notes.status("") as status:
        for shape in sizes:
            for name in names:
                status.update(f"{op} {name} {shape[0]}x{shape[1]}")
                found += timings_of(op, name, shape, batches, device=where, dtype=floats, every=every)
    right = [one for one in found if one.right]
    if csv:
        append(csv, [one.to_row() for one in right])
    if json:
        print_json([one.to_dict() for one in found])
    else:
        show(timing_table(found, f"{op} on {device_name(where)}, {dtype} activations"))
    if len(right) < len(found):
        wrong = next(one for one in found if not one.right)
        raise KernelError(
            f"{wrong.kernel} wants an error of at most {wrong.tolerance:.1e} on {wrong.scheme} {wrong.shape}, batch "
            f"{wrong.batch}, got {wrong.error:.1e}: {len(found) - len(right)} wrong results got no time."
        )


def timing_table(found: list[Timing], title: str) -> Any:
    """A line for each kernel and case."""
    numbers = ("batch", "time", "bf16", "times bf16's speed", "fp32", "times fp32's speed", "error")
    made = table(title, "shape", "scheme", "kernel", *numbers, right=numbers)
    for one in found:
        case = ("x".join(map(str, one.shape)), one.scheme, one.kernel, str(one.batch))
        if one.us is None or one.bf16_us is None or one.fp32_us is None:
            made.add_row(*case, "wrong", "", "", "", "", f"{one.error:.1e}")
            continue
        faster = (f"{one.bf16_us / one.us:.2f}", f"{one.fp32_us / one.us:.2f}")
        made.add_row(
            *case, _time(one.us), _time(one.bf16_us), faster[0], _time(one.fp32_us), faster[1], f"{one.error:.1e}"
        )
    return made


def _time(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


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


def count_of(spelled: str) -> int:
    """A positive number, or a SpellingError."""
    from ..errors import SpellingError

    if not spelled.strip().isdigit() or not int(spelled):
        raise SpellingError(f"--batch wants positive numbers such as 1,16,256, got {spelled!r}.")
    return int(spelled)


COMMANDS = {"bench": bench}
