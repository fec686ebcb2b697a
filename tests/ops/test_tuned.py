"""Measured choices: what is stored is found again by the same machine and no other, and no file is ever an error."""

import json
import os
import warnings

import pytest
import torch

from lowp.ops import tuned

KEY = tuned.key_of("int4/1x128*bf16", torch.bfloat16, (128, 256), 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWP_CACHE", str(tmp_path / "cache"))
    tuned.forget()
    yield tmp_path / "cache"
    tuned.forget()


def test_what_is_stored_is_found_again(cache):
    assert tuned.choice("k", KEY) is None
    where = tuned.store({("k", KEY): {"tile": 64, "split": True}, ("other", KEY): {"tile": 1}})
    assert where.is_relative_to(cache) and [p.name for p in where.parent.iterdir()] == [where.name]
    assert tuned.choice("k", KEY) == {"tile": 64, "split": True}
    assert tuned.choice("k", KEY[:-1] + (8,)) is None and tuned.choice("none", KEY) is None
    tuned.store({("k", KEY): {"tile": 32}, ("other", KEY): None})  # replaced, taken out
    assert tuned.choice("k", KEY) == {"tile": 32} and tuned.choice("other", KEY) is None


def test_the_file_is_read_once(cache, monkeypatch):
    tuned.store({("k", KEY): {"tile": 64}})
    assert tuned.choice("k", KEY)
    monkeypatch.setattr(tuned, "_read", lambda file: pytest.fail("read again"))
    assert tuned.choice("k", KEY) and tuned.choice("none", KEY) is None


def broken_files():
    good = {"machine": {}, "choices": []}
    yield "not JSON", "{"
    yield "no object", "[]"
    yield "nothing in it", "{}"
    yield "another machine", json.dumps(good)
    for name, entry in {
        "no key": {"kernel": "k", "config": {}},
        "a config that is none": {"kernel": "k", "key": [1], "config": 3},
        "a key that cannot be one": {"kernel": "k", "key": [[1]], "config": {}},
        "an entry that is none": 5,
    }.items():
        yield name, json.dumps({"machine": tuned.machine(), "choices": [entry]})


@pytest.mark.parametrize(("what", "text"), [pytest.param(what, text, id=what) for what, text in broken_files()])
def test_a_broken_or_foreign_file_is_ignored_with_a_warning(cache, what, text):
    tuned.path().parent.mkdir(parents=True)
    tuned.path().write_text(text)
    with pytest.warns(UserWarning, match="lowp tune"):
        assert tuned.choice("k", KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.choice("k", KEY) is None  # once
    with pytest.warns(UserWarning):
        tuned.store({("k", KEY): {"tile": 2}})
    assert tuned.choice("k", KEY) == {"tile": 2}


def test_another_version_has_another_file(cache, monkeypatch):
    tuned.store({("k", KEY): {"tile": 64}})
    before = tuned.path()
    monkeypatch.setattr(tuned, "_version", lambda name: "9.9")
    tuned.forget()
    assert tuned.path() != before and tuned.choice("k", KEY) is None


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch):
    where = tuned.store({("k", KEY): {"tile": 64}})
    with pytest.raises(TypeError):
        tuned.store({("k", KEY): {"tile": object()}})
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        tuned.store({("k", KEY): {"tile": 1}})
    assert [p.name for p in where.parent.iterdir()] == [where.name]
    assert tuned.choice("k", KEY) == {"tile": 64}


def test_forced_answers_for_its_kernel_alone_and_is_gone_after(cache):
    tuned.store({("k", KEY): {"tile": 64}})
    with tuned.forced("k", {"tile": 1}):
        assert tuned.choice("k", ("any",)) == {"tile": 1} and tuned.choice("other", KEY) is None
        with tuned.forced("k", None):
            assert tuned.choice("k", KEY) is None
    assert tuned.choice("k", KEY) == {"tile": 64}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"LOWP_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/lowp"), ({"HOME": "/c"}, "/c/.cache/lowp")],
)
def test_the_folder_is_the_users(monkeypatch, variables, expected):
    for name in ("LOWP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(tuned.cache_folder()) == expected


def test_batches_share_a_key_up_to_a_power_of_two():
    sizes = [tuned.key_of("s", torch.float16, (1, 2), batch)[-1] for batch in (1, 2, 3, 4, 5, 64, 65, 8192)]
    assert sizes == [1, 2, 4, 4, 8, 64, 128, 8192]
