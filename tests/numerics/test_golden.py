"""What each format costs, to the last bit: golden.csv holds the errors, and a hash of the codes and scales, of a fixed input.

A change that moves a number is seen here, and so is a torch, a CPU or a GPU that computes differently. If the change is meant,
write the table anew and read the difference before it is committed:

    PYTHONPATH=src python tests/numerics/test_golden.py

The input is made of integers (four hashed ones added, so nearly normal), so that no random generator comes in. Errors are
relative, in float64. Rules that compare sums of float32 (mse, and the mean of the scales in QLoRA's) depend in their last bits on
the order of a sum; there the errors are compared and the hash is not.
"""

import csv
import hashlib
import sys
from pathlib import Path

import pytest
import torch

from lowp.numerics import Format, Parts, dequantize, known_formats, quantize
from lowp.numerics.format import rules_for

GOLDEN = Path(__file__).with_name("golden.csv")
SHAPE = (128, 256)


def fixed_input() -> torch.Tensor:
    """Nearly normal numbers of 12 bits, standard deviation 1, the first row 4 times as large and the second all zero."""
    counter = torch.arange(4 * SHAPE[0] * SHAPE[1], dtype=torch.int64)
    mixed = (counter * 2654435761) & 0xFFFFFFFF  # Knuth's multiplicative hash: 2**32 / golden ratio
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF  # xxHash's second prime
    tenbits = (mixed ^ (mixed >> 13)) & 0x3FF
    x = (tenbits.reshape(4, *SHAPE).sum(dim=0) - 2046).float() / 512  # deviation 2 * 1024 / sqrt(12) / 512 = 1.15
    x[0] *= 4
    x[1] = 0
    return x


def cases() -> list[str]:
    formats = [Format.parse(half) for known in known_formats() for half in known.spelling.split("@")]
    ruled = [fmt.with_rule(rule) for fmt in formats if not fmt.is_identity for rule in rules_for(fmt)]
    return sorted({str(fmt) for fmt in (*formats, *ruled)})


def digest(parts: Parts) -> str:
    """Of the bytes of all parts, in order."""
    sha = hashlib.sha256()
    for name, tensor in parts.tensors().items():
        sha.update(name.encode())
        sha.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def measure(spelling: str, device: torch.device) -> dict[str, str]:
    fmt, x = Format.parse(spelling), fixed_input()
    x = x if fmt.element.signed or fmt.zero_point else x.abs()
    parts = quantize(x.to(device), fmt)
    error = dequantize(parts, fmt, torch.float64).cpu() - x.double()
    return {
        "format": spelling,
        "mean_abs_error": f"{(error.abs().mean() / x.double().abs().mean()).item():.9e}",
        "rms_error": f"{(error.square().mean() / x.double().square().mean()).sqrt().item():.9e}",
        "sha256": digest(parts),
    }


def golden() -> dict[str, dict[str, str]]:
    with GOLDEN.open(newline="") as file:
        return {row["format"]: row for row in csv.DictReader(file)}


def test_the_table_is_complete():
    assert sorted(golden()) == cases(), "run this file to write the table anew"


def test_the_input_is_fixed():
    assert hashlib.sha256(fixed_input().numpy().tobytes()).hexdigest()[:16] == "b9bb8488b7b93256"


@pytest.mark.parametrize("spelling", cases())
def test_golden(spelling, device):
    expected, got = golden()[spelling], measure(spelling, device)
    fmt = Format.parse(spelling)
    ordered = fmt.rule == "mse" or (fmt.nested and fmt.nested.rule == "centered")
    for column in ("mean_abs_error", "rms_error"):
        assert float(got[column]) == pytest.approx(float(expected[column]), rel=1e-4 if ordered else 1e-7, abs=1e-12)
    if not ordered:
        assert got["sha256"] == expected["sha256"]


if __name__ == "__main__":
    with GOLDEN.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["format", "mean_abs_error", "rms_error", "sha256"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(measure(spelling, torch.device("cpu")) for spelling in cases())
    sys.stdout.write(f"{GOLDEN}: {len(cases())} formats\n")
