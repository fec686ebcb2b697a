"""benchmarks/training.py on tiny layers: every row has its baseline, and a recipe whose output is off gets none."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "training.py"


@pytest.fixture
def training():
    spec = importlib.util.spec_from_file_location("benchmark_training", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_training"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_training"]


def test_a_dry_run_writes_rows(training, tmp_path, monkeypatch):
    out = tmp_path / "rows.csv"
    words = ["--device", "cpu", "--small", "--no-torchao", "--modes", "eager", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["training.py", *words, "--recipes", "float8_rowwise"])
    assert training.main() == 0
    rows = list(csv.DictReader(out.open()))
    assert {row["what"] for row in rows} == {
        f"{what} {recipe} eager" for what in ("tiny", "tiny linears", "experts") for recipe in ("bf16", "rowwise")
    }
    assert {row["unit"] for row in rows} == {"ms", "times bf16 compiled"}
    assert all(float(row["value"]) > 0 and row["baseline"] for row in rows if row["unit"] == "ms")


def test_a_recipe_whose_output_is_off_gets_no_row(training, monkeypatch, capsys):
    bench = training.Bench(device="cpu", steps=1, batch=1, tokens=32, small=True, beside=False, record=False)
    monkeypatch.setattr(training, "convert", lambda model, name, **more: [p.data.mul_(3) for p in model.parameters()])
    rows = training.Rows(bench)
    training.measure("tiny", lambda: training.layers_of(training.TINY, 1, bench), rows, ["mxfp8"], ["eager"])
    assert rows.wrong == 1 and {row["recipe"] for row in rows.rows} == {"bf16"}
    assert "no row, its mean square is" in capsys.readouterr().out
    assert torch.is_grad_enabled()
