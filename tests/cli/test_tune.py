"""`lowp tune` with a kernel that has a fast candidate, a slow one, a wrong one and one that raises."""

import dataclasses

import pytest
import torch

from lowp.ops import registry, tuned
from lowp.report import clock
from lowp.report import tune as module

WORDS = ("tune", "--shapes", "64x128", "--schemes", "int8", "--batch", "1,5", "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clock, "CPU_SECONDS", 1e-3)
    tuned.forget()
    yield tmp_path / "cache"
    tuned.forget()


@pytest.fixture
def asked(monkeypatch):
    """A kernel that does its work `times` times over; what it was asked to do is listed."""
    kernels = registry.kernels_of("linear")
    (real,) = [kernel for kernel in kernels if kernel.name == "dequantize"]
    asked = []

    def run(x_MK, packed, spec, bias):
        key = tuned.key_of(spec.scheme, x_MK.dtype, spec.shape, x_MK.shape[0])
        config = tuned.choice("knob", key) or {"times": 20}
        asked.append(config["times"])
        if config["times"] == 0:
            raise ValueError("no such tile")
        for _ in range(config["times"]):
            y = real.run(x_MK, packed, spec, bias)
        return y * config.get("factor", 1.0)

    knob = dataclasses.replace(
        real, name="knob", rank=0, run=run, fallback=False,
        candidates=lambda case, batch: [{"times": 40}, {"times": 1}, {"times": 1, "factor": 2.0}, {"times": 0}],
    )  # fmt: skip
    monkeypatch.setattr(registry, "kernels_of", lambda op: (knob, *kernels))
    return asked


def test_the_fastest_right_candidate_is_kept_and_used(lowp, asked):
    answer = lowp(*WORDS)
    assert answer.code == 0, (answer.err, answer.exception)
    assert (
        "times=1" in answer.out and "no such tile" in answer.out and str(tuned.path()) in answer.out.replace("\n", "")
    )
    for batch in (1, 5, 8):  # 8 shares its key with 5
        key = tuned.key_of("int8/row", torch.bfloat16, (64, 128), batch)
        assert tuned.choice("knob", key) == {"times": 1}
    del asked[:]
    found = lowp("bench", "linear", "--shapes", "64x128", "--schemes", "int8", "--batch", "1", "--json").json()
    assert found[0]["kernel"] == "knob" and set(asked) == {1}


def test_kernels_without_candidates_say_so(lowp, asked):
    answer = lowp(*WORDS)
    assert "int8pack_cpu int8/row: it declares no candidates" in answer.out
    found = lowp(*WORDS, "--json").json()
    assert {one["kernel"] for one in found["found"] if one["tried"]} == {"knob"}
    assert all(len(one["wrong"]) == 2 and one["us"] < one["default_us"] for one in found["found"] if one["tried"])


def test_a_dry_run_keeps_nothing(lowp, asked, cache):
    assert "nothing was kept" in lowp(*WORDS, "--dry-run").out
    assert not cache.exists()


def test_a_default_that_is_as_fast_is_left_alone_and_an_old_choice_goes(lowp, asked, monkeypatch):
    key = tuned.key_of("int8/row", torch.bfloat16, (64, 128), 1)
    tuned.store({("knob", key): {"times": 40}})
    monkeypatch.setattr(module, "_WORTH", 0.0)  # nothing is that much faster
    assert "the default" in lowp(*WORDS).out
    assert tuned.choice("knob", key) is None


def test_bad_input_is_one_sentence(lowp):
    for words in (("--shapes", "lama"), ("--schemes", "int44"), ("--batch", "x"), ("--device", "tpu")):
        assert lowp(*WORDS, *words).is_one_sentence(), words
