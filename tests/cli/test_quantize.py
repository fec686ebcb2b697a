"""`lowp quantize` does to files what `quantize_` does to a model, and answers bad input with one sentence."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowp as library
from lowp.integrations import load
from lowp.integrations import transformers as hf
from lowp.quantize.checkpoint import load_state, save
from lowp.tensor import QTensor

SOURCE = Path(__file__).parents[2] / "src"


def from_pretrained(folder):
    return hf.load(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


# -- the same as in memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, rules",
    [
        (["--to", "int4"], "int4"),
        (
            ["--to", "int4", "--rule", "lm_head=none", "--rule", "*.down_proj=int8"],
            {"lm_head": None, "*.down_proj": "int8", "*": "int4"},
        ),
        (["--to", "nvfp4"], "nvfp4"),
        (["--to", "int3", "--method", "hqq"], "int3"),
        (
            ["--to", "int8", "--rule", r"re:.*\.(q|k)_proj=fp8-dynamic"],
            {r"re:.*\.(q|k)_proj": "fp8-dynamic", "*": "int8"},
        ),
    ],
)
def test_equals_quantizing_in_memory(options, rules, llama, lowp, tmp_path):
    method = "hqq" if "hqq" in options else "absmax"
    answer = lowp("quantize", llama, *options, "--out", tmp_path / "out", "--json").json()
    model = from_pretrained(llama)
    report = library.quantize_(model, rules, method=method)
    save(model, tmp_path / "expected", config_from=llama)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    rows = {row["fqn"]: row for row in answer["rows"]}
    for row in report.rows:
        assert (rows[row.fqn]["scheme"], rows[row.fqn]["why"]) == (row.scheme, row.why)
    ids = torch.arange(20)[None]
    assert torch.equal(load(tmp_path / "out")(ids).logits, model(ids).logits)


def test_untied_and_sharded_models(tmp_path, lowp, new_llama):
    source = new_llama(tmp_path / "source", tied=False, dtype=torch.float32, shard="300KB")
    assert (source / "model.safetensors.index.json").is_file()
    lowp("quantize", source, "--to", "int4", "--shard-gb", "0.0001", "--out", tmp_path / "out", "--json").json()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = load(tmp_path / "out")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, QTensor) and not isinstance(model.model.embed_tokens.weight, QTensor)


def test_experts_that_are_stored_one_by_one(tmp_path, lowp):
    """transformers stores Mixtral's experts apart and holds them as one tensor (E, N, K)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
        num_local_experts=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    assert any(".experts.3." in name for name in load_file(tmp_path / "source" / "model.safetensors"))
    answer = lowp("quantize", tmp_path / "source", "--to", "int4", "--out", tmp_path / "out", "--json").json()
    model = from_pretrained(tmp_path / "source")
    library.quantize_(model, "int4")
    save(model, tmp_path / "expected", config_from=tmp_path / "source")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert any(row["kind"] == "experts" and row["scheme"] for row in answer["rows"]) and answer["left_out"] == []


def test_the_table_accounts_for_every_byte(llama, lowp, tmp_path):
    answer = lowp(
        "quantize", llama, "--to", "int4", "--rule", "*.o_proj=none", "--out", tmp_path / "out", "--json"
    ).json()
    assert answer["bytes_before"] == sum(t.nbytes for t in load_file(llama / "model.safetensors").values())
    assert answer["bytes_after"] == sum(group["bytes_after"] for group in answer["groups"])
    kept = [group for group in answer["groups"] if group["scheme"] is None]
    assert kept and all(group["why"] for group in kept)
    shown = lowp("quantize", llama, "--to", "int4", "--rule", "*.o_proj=none", "--out", tmp_path / "again")
    assert "rule '*.o_proj' keeps it" in shown.out and "int4/1x128*bf16" in shown.out and "mean error" in shown.out


def test_dry_run_writes_nothing(llama, lowp, tmp_path):
    shown = lowp("quantize", llama, "--to", "int4", "--dry-run", "--out", tmp_path / "out")
    assert shown.code == 0 and "q_proj" in shown.out and list(tmp_path.iterdir()) == []
    rows = lowp("quantize", llama, "--to", "int4", "--dry-run", "--json").json()["rows"]
    assert all(row["scheme"] == "int4/1x128*bf16" for row in rows)


def test_tensors_that_the_model_does_not_have_are_reported(llama, lowp, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    state = load_file(source / "model.safetensors") | {"model.layers.0.self_attn.strange": torch.zeros(3)}
    save_file(state, source / "model.safetensors")
    assert lowp("quantize", source, "--to", "int4", "--out", tmp_path / "a", "--json").json()["left_out"] == [
        "model.layers.0.self_attn.strange"
    ]
    assert "strange" in lowp("quantize", source, "--to", "int4", "--out", tmp_path / "b").out


def test_on_misfit_skip_keeps_the_layer_and_says_why(llama, lowp, tmp_path):
    answer = lowp(
        "quantize", llama, "--to", "int4/1x256*bf16", "--on-misfit", "skip", "--out", tmp_path / "out", "--json"
    ).json()
    skipped = [row for row in answer["rows"] if row["why"].startswith("skipped")]
    assert skipped and all(row["scheme"] is None for row in skipped)
    assert not isinstance(load_state(tmp_path / "out")[skipped[0]["fqn"]], QTensor)


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------

SLOW = """
import time
from lowp.quantize import stream
quantized = stream._quantized
def slow(*args):
    time.sleep(0.2)
    print("working", flush=True)
    return quantized(*args)
stream._quantized = slow
from lowp.cli import main
main()
"""


def test_ctrl_c_leaves_work_that_the_same_command_finishes(llama, lowp, tmp_path):
    command = ["quantize", str(llama), "--to", "int4", "--out", str(tmp_path / "out")]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command],
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    for _ in range(4):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130
    assert "Traceback" not in err and "the same command goes on from there" in err
    assert not (tmp_path / "out").exists() and work_of(tmp_path / "out").is_dir()
    assert lowp(*command).code == 0
    assert lowp("quantize", llama, "--to", "int4", "--out", tmp_path / "whole").code == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        (["--to", "int44"], "did you mean 'int4'"),
        (["--to", "int4/1x96"], "multiples of 1 x 96"),
        (["--to", "int4", "--method", "hqqq"], "did you mean 'hqq'"),
        (["--to", "int4", "--on-misfit", "skipp"], "did you mean 'skip'"),
        (["--to", "int4", "--rule", "lm_head"], "--rule wants PATTERN=SCHEME"),
        (["--to", "int4", "--rule", "=int8"], "--rule wants PATTERN=SCHEME"),
        (["--to", "int4", "--rule", "*.q_porj=int8"], "matches no layer"),
        (["--to", "int4", "--rule", "re:(=int8"], "not a regular expression"),
        (["--to", "int4", "--device", "cuda:77"], "device"),
        (["--to", "int4", "--shard-gb", "0"], "--shard-gb"),
    ],
)
def test_bad_options_are_one_sentence(options, said, llama, lowp, tmp_path):
    answer = lowp("quantize", llama, *options, "--out", tmp_path / "out")
    assert answer.is_one_sentence() and said in answer.err, answer.err
    assert list(tmp_path.iterdir()) == []


def test_no_out_is_one_sentence(llama, lowp):
    assert lowp("quantize", llama, "--to", "int4").is_one_sentence()


def damaged(source: Path, kind: str) -> None:
    weights = source / "model.safetensors"
    if kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "only pickles":
        weights.rename(source / "pytorch_model.bin")
    elif kind == "no config":
        (source / "config.json").unlink()
    elif kind == "config is no json":
        (source / "config.json").write_text("{")
    elif kind in ("unknown model", "unknown class", "quantized by others", "another size"):
        change = {
            "unknown model": {"model_type": "lamma"},
            "unknown class": {"architectures": ["LammaForCausalLM"]},
            "quantized by others": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "another size": {"hidden_size": 256},
        }[kind]
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | change))
    else:
        state = load_file(weights)
        name = "model.layers.1.mlp.up_proj.weight"
        if kind == "a tensor is missing":
            del state[name]
        elif kind == "wrong dtype":
            state[name] = state[name].to(torch.float8_e4m3fn)
        elif kind == "integers":
            state[name] = state[name].to(torch.int8)
        elif kind == "not a number":
            state[name][3, 4] = torch.nan
        save_file(state, weights)


@pytest.mark.parametrize(
    "kind, said",
    [
        ("cut short", "cut short"),
        ("only pickles", "only pickles"),
        ("no config", "config.json"),
        ("config is no json", "wants JSON"),
        ("unknown model", "lamma"),
        ("unknown class", "LammaForCausalLM"),
        ("quantized by others", "by gptq"),
        ("another size", "do not belong together"),
        ("a tensor is missing", "model.layers.1.mlp.up_proj.weight"),
        ("wrong dtype", "float8_e4m3fn"),
        ("integers", "int8"),
        ("not a number", "1 NaN and 0 infinite of 32768"),
    ],
)
def test_bad_input_is_one_sentence(kind, said, llama, lowp, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    damaged(source, kind)
    answer = lowp("quantize", source, "--to", "int4", "--out", tmp_path / "out")
    assert answer.is_one_sentence() and said in answer.err, answer.err
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(llama, lowp, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out, said, more in (
        (tmp_path / "there", "exists", []),
        (tmp_path / "there", "remove it yourself", ["--overwrite"]),
        (tmp_path / "file", "exists", []),
        (tmp_path / "no" / "parent", "no directory", []),
        (tmp_path / "file" / "out", "no directory", []),
        (llama, "exists", []),
        (llama, "remove it yourself", ["--overwrite"]),
    ):
        answer = lowp("quantize", llama, "--to", "int4", "--out", out, *more)
        assert answer.is_one_sentence() and said in answer.err, answer.err
    assert (tmp_path / "there" / "thesis.txt").read_text() == "years of work"
    assert (llama / "model.safetensors").is_file()


def test_overwrite_replaces_a_checkpoint_of_ours(llama, lowp, tmp_path):
    lowp("quantize", llama, "--to", "int4", "--out", tmp_path / "out")
    assert lowp("quantize", llama, "--to", "int8", "--out", tmp_path / "out").is_one_sentence()
    assert lowp("quantize", llama, "--to", "int8", "--out", tmp_path / "out", "--overwrite").code == 0
    assert load_state(tmp_path / "out")["lm_head.weight"].scheme == "int8/row"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_quantized_checkpoint_is_no_input(llama, lowp, tmp_path):
    lowp("quantize", llama, "--to", "int4", "--out", tmp_path / "out")
    answer = lowp("quantize", tmp_path / "out", "--to", "int8", "--out", tmp_path / "twice")
    assert answer.is_one_sentence() and "quantized already" in answer.err


def test_no_space_left_is_one_sentence(llama, lowp, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        answer = lowp("quantize", llama, "--to", "int4", "--out", tmp_path / "out")
    assert answer.is_one_sentence() and "GB of space, got" in answer.err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full(llama, lowp, tmp_path):
    """A file system of 64 kB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        answer = lowp("quantize", llama, "--to", "int4", "--out", disk / "out")
        assert answer.is_one_sentence() and "of space" in answer.err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
