"""Models are built from a directory without their weights, and filled from ours."""

import json
from pathlib import Path

import pytest
import torch

import lowp
from lowp.errors import CheckpointError
from lowp.integrations import load
from lowp.integrations import transformers as hf
from lowp.quantize.checkpoint import save
from lowp.tensor import QTensor


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
        tie_word_embeddings=True, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def test_an_empty_model_has_no_numbers_but_its_buffers(llama):
    from transformers import LlamaForCausalLM

    model, real = hf.empty_model(llama), LlamaForCausalLM.from_pretrained(llama)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in real.named_parameters()]
    for (name, mine), (_, theirs) in zip(model.named_buffers(), real.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8", "mxfp4", "nvfp4", "nf4/1x64*bf16"])
def test_save_and_load_give_the_same_logits(scheme, llama, tmp_path):
    model = hf.load(llama)
    lowp.quantize_(model, scheme)
    save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    loaded = load(tmp_path / "out")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert isinstance(loaded.lm_head.weight, QTensor) and loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_loaded_model_generates(llama, tmp_path):
    model = hf.load(llama)
    lowp.quantize_(model, "int4")
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", dtype=torch.float32)
    made = loaded.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 9)


def test_a_float_checkpoint_loads_too(llama):
    assert hf.load(llama).dtype == torch.bfloat16
    assert hf.load(llama, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(CheckpointError, match="in floats"):
        load(llama)


def test_no_tokenizer_is_said(llama):
    with pytest.raises(CheckpointError, match="tokenizer"):
        hf.tokenizer(llama)
