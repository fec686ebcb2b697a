"""`lowp tune`: let the kernels of this machine be measured once, and keep the fastest configuration of each.

    lowp tune --shapes llama3-8b --schemes int4 --batch 1..64 --device cuda
    lowp tune --shapes 28672x4096 --schemes int4,fp8-dynamic --dry-run           measure, keep nothing

Nothing needs this: every kernel has a rule that chooses by itself. What is found lies in a file of this GPU and these versions
(`lowp.ops.tuned`) and is used from the next process on, and by this one. A kernel that has nothing to choose says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Device, Dtype, Json, device_of, dtype_of, print_json, progress_console, show, table
from .bench import Batches, Schemes, Shapes, batches_of, shapes_of

if TYPE_CHECKING:
    from ..report.tune import Tuned

DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure and keep nothing.")]


def tune(
    schemes: Schemes = "int4",
    shapes: Shapes = "llama3-8b",
    batch: Batches = "1..64",
    device: Device = "cuda",
    dtype: Dtype = "bf16",
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Time the candidates of each kernel on your shapes, and keep the fastest."""
    import dataclasses

    from ..numerics import Scheme
    from ..ops import tuned
    from ..report.results import device_name
    from ..report.tune import tune as measured

    where, floats = str(device_of(device)), dtype_of(dtype)
    names = [str(Scheme.parse(name)) for name in schemes.split(",")]
    sizes, batches = shapes_of(shapes), batches_of(batch)
    notes, found = progress_console(), []
    with notes.status("") as status:
        for shape in sizes:
            for name in names:
                part = []
                for one in measured(name, shape, batches, device=where, dtype=floats):
                    status.update(f"{one.kernel} {name} {shape[0]}x{shape[1]}, batch {one.batch}")
                    part.append(one)
                if not dry_run:  # as it goes: what is measured is kept, whatever comes later
                    kept = dict(one.entry(floats) for one in part if one.us is not None)
                    _ = tuned.store(kept) if kept else None
                found += part
    where_to = "" if dry_run or not any(one.tried for one in found) else str(tuned.path())
    if json:
        print_json({"file": where_to, "found": [dataclasses.asdict(one) for one in found]})
        return
    show(*_tables(found, f"tuned on {device_name(where)}, {dtype} activations"))
    show(f"kept in {where_to}" if where_to else "nothing was kept")


def _tables(found: list[Tuned], title: str) -> list[Any]:
    numbers = ("batch", "default", "tuned", "faster", "tried", "wrong")
    made = table(title, "kernel", "scheme", "shape", *numbers, "configuration", right=numbers)
    for one in found:
        if not one.tried:
            continue
        case = (one.kernel, one.scheme, "x".join(map(str, one.shape)), str(one.batch))
        times = [f"{us:.1f} us" if us else "" for us in (one.default_us, one.us)]
        faster = f"{one.default_us / one.us:.2f}" if one.default_us and one.us else ""
        said = "the default" if one.config is None else " ".join(f"{k}={v}" for k, v in one.config.items())
        made.add_row(*case, *times, faster, str(one.tried), str(len(one.wrong)), said)
    lines = dict.fromkeys(
        f"{one.kernel} {one.scheme}: {one.why_not or 'no candidates here'}" for one in found if not one.tried
    )
    wrong = [f"{one.kernel} {one.shape}, batch {one.batch}, {why}" for one in found for why in one.wrong]
    return [*([made] if made.row_count else []), *lines, *wrong[:20]]


COMMANDS = {"tune": tune}
