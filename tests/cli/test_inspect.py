"""`lowp inspect` counts what is there, for our checkpoints and for plain ones."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lowp.quantize.checkpoint import load_state
from lowp.tensor import QTensor


@pytest.fixture
def ours(llama, lowp, tmp_path):
    lowp("quantize", llama, "--to", "int4", "--rule", "*.down_proj=int8", "--out", tmp_path / "ours", "--json").json()
    return tmp_path / "ours"


def test_a_plain_checkpoint(llama, lowp):
    answer = lowp("inspect", llama, "--json").json()
    state = load_file(llama / "model.safetensors")
    assert {row["name"]: row["shape"] for row in answer["tensors"]} == {
        name: list(t.shape) for name, t in state.items()
    }
    assert answer["total"]["bytes"] == sum(t.nbytes for t in state.values())
    assert set(answer["schemes"]) == {"bfloat16"}


def test_a_checkpoint_of_ours(ours, lowp):
    answer = lowp("inspect", ours, "--json").json()
    state = {name: tensor for name, tensor in load_state(ours).items() if name not in answer["tied"]}
    rows = {row["name"]: row for row in answer["tensors"]}
    assert rows.keys() == state.keys()
    for name, tensor in state.items():
        held = tensor.packed_nbytes if isinstance(tensor, QTensor) else tensor.nbytes
        assert (rows[name]["bytes"], rows[name]["parameters"]) == (held, math.prod(tensor.shape))
    assert answer["total"]["bytes"] == sum(row["bytes"] for row in answer["schemes"].values())
    assert answer["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_table_folds_the_layers(ours, lowp):
    folded, every = lowp("inspect", ours).out, lowp("inspect", ours, "--all").out
    assert "model.layers.*.mlp.down_proj.weight" in folded and "model.layers.1.mlp.down_proj.weight" not in folded
    assert "model.layers.1.mlp.down_proj.weight" in every
    assert "int8/row" in folded and "4.125" in folded and "lm_head.weight is model.embed_tokens.weight" in folded


def test_damage_is_found_unless_told_not_to_look(ours, lowp):
    path = ours / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    answer = lowp("inspect", ours)
    assert answer.is_one_sentence() and "SHA-256" in answer.err
    assert lowp("inspect", ours, "--no-verify").code == 0


def test_a_checkpoint_of_another_kind_of_tensors(tmp_path, lowp):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, dtype=torch.int64), "b": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    answer = lowp("inspect", tmp_path, "--json").json()
    assert answer["schemes"]["int64"]["bytes"] == 24
    assert lowp("inspect", tmp_path).code == 0


def test_bad_input_is_one_sentence(tmp_path, llama, lowp):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "empty").mkdir()
    shutil.copytree(llama, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    shutil.copytree(llama, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "lost.safetensors"}})
    )
    for name, said in (
        ("nothing", "does not exist"),
        ("pickled", "only pickles"),
        ("empty", "an empty directory"),
        ("cut", "cut short"),
        ("sharded", "lost.safetensors"),
        ("cut/config.json", "the file"),
    ):
        answer = lowp("inspect", tmp_path / name)
        assert answer.is_one_sentence() and said in answer.err, answer.err
