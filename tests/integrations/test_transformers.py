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


SMALL = str(Path(__file__).parents[2] / "examples" / "small_lm")
SCHEMES = ["int8", "int8/row@int8/row", "int4/1x32*bf16", "int4/1x32*bf16+fp32", "e4m3/row@e4m3/row", "nvfp4", "mxfp8"]


@pytest.mark.parametrize("rules", [*SCHEMES, {"*mlp*": "int8", "*self_attn*": "e4m3/row"}], ids=str)
def test_quantized_while_loading(rules, tmp_path):
    """The same numbers as lowp.quantize_, and a config.json that says torchao, never a name that nobody knows."""
    import transformers

    from lowp.integrations.transformers import LowpConfig

    given = {"dtype": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, quantization_config=LowpConfig(rules), **given)
    after = transformers.AutoModelForCausalLM.from_pretrained(SMALL, **given)
    lowp.quantize_(after, {"lm_head": None, "*": rules} if isinstance(rules, str) else rules)
    mine, expected = dict(model.named_parameters()), dict(after.named_parameters())
    quantized = {name for name, p in mine.items() if isinstance(p, lowp.QTensor)}
    assert quantized == {name for name, p in expected.items() if isinstance(p, lowp.QTensor)} != set()
    assert all(torch.equal(mine[name].dequantize(), expected[name].dequantize()) for name in quantized)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "torchao" and written["quant_type"]["default"]["_type"]


def test_a_scheme_that_torchao_cannot_say_is_not_saved_as_one(tmp_path):
    import transformers

    from lowp.integrations.transformers import LowpConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(
        SMALL, quantization_config=LowpConfig("int3/1x64*bf16+bf16", method="hqq"), dtype=torch.bfloat16
    )
    with pytest.raises(lowp.LowpError, match=r"save it with lowp\.save"):
        model.save_pretrained(tmp_path)
    assert lowp.save(model, tmp_path / "ours")
