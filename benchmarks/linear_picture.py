"""Draw the picture of the README, docs/img/linear_gpu.png, from rows: nothing is measured.

A panel for each shape, a line for each scheme, speed over bf16 against tokens. Of rows of one case the last one counts, so
a picture may hold rows of several commits: its title names them.

    python benchmarks/linear_picture.py
    python benchmarks/linear_picture.py --device 'NVIDIA H100 80GB HBM3' --out h100.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from lowp.report.bench import Timing
from lowp.report.plots import speed_by_batch

ROOT = Path(__file__).parents[1]


def newest(rows: Path, device: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The last row of each case that was measured on `device`.

    Raises:
        SystemExit: there is none.
    """
    with rows.open(newline="", encoding="utf-8") as file:
        found = {
            tuple(row[key] for key in ("scheme", "M", "N", "K", "dtype")): row
            for row in csv.DictReader(file)
            if row["device"] == device
        }
    if not found:
        raise SystemExit(f"{rows} has no row of {device!r}: name a device that stands there.")
    return found


def timing(row: dict[str, str]) -> Timing:
    """What the row was written from; its error was within the tolerance, else it had no row."""
    keys = {key: row[key] for key in ("scheme", "kernel", "layout", "dtype", "device")}
    return Timing(
        op=row["what"], shape=(int(row["N"]), int(row["K"])), batch=int(row["M"]), error=float(row["error"]),
        tolerance=float(row["error"]), us=float(row["value"]), bf16_us=float(row["baseline"]), **keys,
    )  # fmt: skip


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT / "benchmarks" / "results" / "linear_gpu.csv")
    parser.add_argument("--device", default="NVIDIA H200")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "linear_gpu.png")
    asked = parser.parse_args()
    rows = newest(asked.rows, asked.device).values()
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    speed_by_batch([timing(row) for row in rows], f"linear, {asked.device}, commits {commits}", str(asked.out))
    print(f"{asked.out}: {len(rows)} cases")


if __name__ == "__main__":
    main()
