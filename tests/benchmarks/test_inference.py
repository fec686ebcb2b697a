"""benchmarks/inference.py on a tiny model: the blocks are Llama's, one graph serves all layers, and what is wrong gets no row."""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

import lowp
from lowp.numerics.compare import relative_error

PATH = Path(__file__).parents[2] / "benchmarks" / "inference.py"
TINY = ["--model", "tiny", "--layers", "2", "--device", "cpu", "--context", "16", "--prompt", "12", "--steps", "2"]


@pytest.fixture(scope="module")
def inference():
    spec = importlib.util.spec_from_file_location("benchmark_inference", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_inference"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_inference"]


def model_of(inference, *, fused=False, layers=2, dtype=torch.float32):
    model = inference.random_model(inference.TINY, layers, fused, "cpu").to(dtype)
    for block in model.layers:  # norms that are not 1 show whether they are applied
        block.attention_norm.weight.normal_(1.0, 0.2)
        block.mlp_norm.weight.normal_(1.0, 0.2)
    return model


def run_of(inference, model, context):
    run = inference.Run(model, context, inference.Block.forward)
    run.cache = [[tensor.to(model.norm.weight.dtype) for tensor in pair] for pair in run.cache]
    return run


def test_it_is_the_llama_of_transformers(inference):
    from transformers import LlamaConfig, LlamaForCausalLM

    size, model = inference.TINY, model_of(inference)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=2, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head_dim, vocab_size=size.vocabulary, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config)
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    state = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.layers):
        for name, parameter in block.named_parameters():
            stem = name.removesuffix(".weight")
            room = "mlp." if stem in ("gate_proj", "up_proj", "down_proj") else "self_attn." if "proj" in stem else ""
            state[f"model.layers.{i}.{room}{names.get(stem, stem)}.weight"] = parameter
    theirs.load_state_dict(state | {"lm_head.weight": model.lm_head.weight})
    tokens = torch.randint(0, size.vocabulary, (1, 9))
    with torch.no_grad():
        ours = run_of(inference, model, 16).forward(tokens, torch.arange(9))
        assert relative_error(theirs(tokens).logits[:, -1], ours) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_decoding_token_by_token_is_the_prefill(inference, fused):
    model = model_of(inference, fused=fused)
    tokens = torch.randint(0, inference.TINY.vocabulary, (1, 7))
    with torch.no_grad():
        whole = run_of(inference, model, 16).forward(tokens, torch.arange(7))
        run = run_of(inference, model, 16)
        for i in range(7):
            last = run.forward(tokens[:, i : i + 1], torch.tensor([i]))
    assert relative_error(whole, last) < 1e-5


def test_quantizing_shares_what_stays_and_says_what_lm_head_is(inference):
    model = inference.random_model(inference.TINY, 2, False, "cpu")
    for scheme, head in (("int8/row", "int8/row"), ("int8/row@int8/row", "bf16")):
        made, said = inference.quantized(model, scheme)
        assert said == head and isinstance(made.lm_head.weight, lowp.QTensor) == (head != "bf16")
        assert made.embed.weight.data_ptr() == model.embed.weight.data_ptr()
        linears = [m for m in made.layers.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linears) == 14 and all(m.weight.scheme == scheme for m in linears)
        assert inference.weight_bytes(made) < inference.weight_bytes(model)
    assert not any(isinstance(p, lowp.QTensor) for p in model.parameters())


def test_one_compiled_graph_serves_all_layers(inference):
    from torch._dynamo.testing import CompileCounterWithBackend

    model, _ = inference.quantized(inference.random_model(inference.TINY, 3, False, "cpu"), "int8")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = inference.Run(
        model, 16, torch.compile(inference.Block.forward, dynamic=False, fullgraph=True, backend=counter)
    )
    with torch.no_grad():
        run.step()
        run.step()
    assert counter.frame_count == 1


def test_rows_hold_the_ratio_to_bf16_of_the_same_run(inference, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # a table as wide as it wants to be
    out = tmp_path / "rows.csv"
    assert inference.main([*TINY, "--eager", "--schemes", "int8,fp8-dynamic", "--csv", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["scheme"] for row in rows] == ["bf16"] * 3 + ["int8/row"] * 3 + ["e4m3/row@e4m3/row"] * 3
    for row in rows[3:]:
        (base,) = [other for other in rows[:3] if other["what"] == row["what"]]
        assert row["baseline"] == base["value"]
        assert float(row["ratio"]) == pytest.approx(float(row["value"]) / float(base["value"]), rel=1e-4)
    assert float(rows[5]["ratio"]) < 1 and rows[6]["lm_head"] == "bf16"
    assert "times bf16" in capsys.readouterr().out


def test_a_wrong_model_gets_no_row_and_does_not_stop_the_others(inference, tmp_path, monkeypatch, capsys):
    real = inference.quantized

    def broken(model, scheme):
        made, head = real(model, scheme)
        if scheme == "int8/row":
            raise ZeroDivisionError("out of luck")
        made.layers[0].attention_norm.weight = torch.nn.Parameter(torch.full_like(made.norm.weight, math.nan))
        return made, head

    monkeypatch.setattr(inference, "quantized", broken)
    out = tmp_path / "rows.csv"
    assert inference.main([*TINY, "--eager", "--schemes", "int8,int4", "--csv", str(out)]) == 1
    assert {row["scheme"] for row in csv.DictReader(out.open())} == {"bf16"}
    said = capsys.readouterr().out
    assert "out of luck" in said and "off by nan" in said
