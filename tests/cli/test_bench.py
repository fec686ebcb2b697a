"""`lowp bench`: shapes by model and batches by range, rows and a plot, and exit code 2 where something was wrong."""

import csv
import dataclasses
import json

import pytest

from lowp.cli.bench import batches_of, shapes_of
from lowp.errors import SpellingError
from lowp.ops import registry
from lowp.report import clock
from lowp.report.models import MODELS

SMALL = ("bench", "linear", "--shapes", "64x128,128x128", "--schemes", "int8,fp8", "--batch", "1..4")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(clock, "CPU_SECONDS", 1e-4)


def test_a_sweep_prints_the_smallest_speeds_and_appends_rows(lowp, tmp_path):
    answer = lowp(*SMALL, "--csv", tmp_path / "rows.csv", "--plot", tmp_path / "speed.png")
    assert answer.code == 0 and "smallest speed" in answer.out
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {(row["N"], row["K"], row["M"], row["scheme"]) for row in rows} == {
        (n, "128", m, s) for n in ("64", "128") for m in "124" for s in ("int8/row", "e4m3/row")
    }
    assert all(row["unit"] == "us" and float(row["ratio"]) > 0 for row in rows)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    brief = lowp(*SMALL, "--brief").out
    assert "smallest speed" in brief and brief.count("\n") < answer.out.count("\n")


def test_json_is_a_list_of_cases(lowp):
    found = lowp(*SMALL, "--json").json()
    assert len(found) == 12 and all(one["right"] and one["speed"] > 0 for one in found)


def test_what_raises_is_said_at_the_end_and_the_rest_is_kept(lowp, tmp_path, monkeypatch):
    def refuse(*args):
        raise ZeroDivisionError("out of luck")

    kernels = registry.kernels_of("linear")
    changes = dict(name="unlucky", rank=0, layout="plain", run=refuse)
    first = dataclasses.replace(kernels[0], why_not=lambda case: "" if case.scheme == "int8/row" else "no", **changes)
    monkeypatch.setattr(registry, "kernels_of", lambda op: (first, *kernels))
    answer = lowp(*SMALL, "--csv", tmp_path / "rows.csv")
    assert answer.code == 2 and "unlucky on int8/row" in answer.err and "out of luck" in answer.err
    assert "failed" in answer.out and "6 of 12" in answer.err
    assert {row["scheme"] for row in csv.DictReader((tmp_path / "rows.csv").open())} == {"e4m3/row"}


def test_no_time_for_a_wrong_kernel(lowp, monkeypatch):
    monkeypatch.setattr("lowp.report.bench.linear_reference", lambda x, packed, spec: x.new_zeros(x.shape[0], 64))
    answer = lowp("bench", "linear", "--schemes", "int8", "--shapes", "64x64", "--batch", "2", "--json")
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert json.loads(answer.out)[0]["us"] is None


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--shapes", "lama3-8b", "did you mean 'llama3-8b'"),
        ("--shapes", "64", "--shapes wants"),
        ("--shapes", "", "--shapes wants"),
        ("--batch", "0", "--batch wants"),
        ("--batch", "5..7", "power of two"),
        ("--batch", "1..x", "--batch wants"),
        ("--schemes", "int44", "did you mean"),
    ],
)
def test_bad_input_is_one_sentence(lowp, option, value, said):
    answer = lowp("bench", "linear", option, value)
    assert answer.is_one_sentence() and said in answer.err


def test_a_shape_that_nothing_runs_on_is_one_sentence(lowp):
    answer = lowp("bench", "linear", "--schemes", "int4", "--shapes", "64x63")
    assert answer.is_one_sentence() and "int4/1x128*bf16" in answer.err


def test_every_model_is_a_list_of_its_shapes_each_once():
    for name, model in MODELS.items():
        assert sorted(shapes_of(name)) == sorted(set(model.linears().values()))
    both = shapes_of("llama3-8b,4096x4096,llama3-8b")
    assert both == shapes_of("llama3-8b")


def test_ranges_are_powers_of_two_in_order():
    assert batches_of("1..8192") == [2**i for i in range(14)]
    assert batches_of("3..17,16,5") == [4, 8, 16, 5]
    with pytest.raises(SpellingError):
        batches_of("8..4")
