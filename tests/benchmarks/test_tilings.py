"""The rule that chooses tilings, judged by the sweeps that stand in benchmarks/results."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tilings():
    spec = importlib.util.spec_from_file_location("tilings", BENCHMARKS / "tilings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rule_is_near_the_best_that_was_measured(tilings, capsys):
    tilings.judge(str(tilings.RESULTS))
    words = capsys.readouterr().out.splitlines()[-1].split()
    cases, mean, worst = int(words[0]), float(words[2]), float(words[-3])
    assert cases >= 60 and 1.0 <= mean <= 1.02 and worst <= 1.12


def test_a_choice_that_was_not_measured_is_named(tilings, tmp_path, capsys):
    lines = tilings.RESULTS.read_text().splitlines()
    one = tmp_path / "rows.csv"
    one.write_text("\n".join([lines[0], next(line for line in lines[1:] if ",256,4096,14336," in line)]))
    tilings.judge(str(one))
    said = capsys.readouterr().out
    assert "was not measured" in said and said.endswith("no choice of the rule was measured\n")
