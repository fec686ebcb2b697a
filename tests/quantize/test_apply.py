"""quantize_ on whole models: numbers, bytes, ties, reasons; nothing silent."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import lowp
from lowp.errors import KernelError, MisfitError, QuantizedError, SpellingError
from lowp.numerics import PRESETS, Scheme, dequantize, quantize
from lowp.numerics.compare import relative_error
from lowp.numerics.math import quantize_given
from lowp.quantize import Method, quantize_weight
from lowp.tensor import QTensor

from .test_match import Model


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_and_reports_truly(preset, device):
    model = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 128)).to(device)
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    report = lowp.quantize_(model, getattr(lowp, preset))
    x = torch.randn(4, 256, device=device)
    assert model(x).isfinite().all()
    fmt = Scheme.parse(getattr(lowp, preset)).weight
    for row, weight, layer in zip(report.rows, weights, (model[0], model[2]), strict=True):
        expected = dequantize(quantize(weight, fmt), fmt)
        assert relative_error(expected, layer.weight.dequantize(torch.float32)) < 1e-6
        assert row.error == pytest.approx(relative_error(weight, expected), rel=1e-6)
        assert row.bytes_before == weight.numel() * 4 and row.bytes_after == layer.weight.packed_nbytes
        assert row.scheme == getattr(lowp, preset) and row.kernel and not layer.weight.requires_grad


def test_the_report_prints_and_is_json():
    report = lowp.quantize_(Model().bfloat16(), {"layers.*": "int4", "head": "int8", "*": None})
    text = str(report)
    assert "keeps it" in text and "MB ->" in text and "embedding by " in text and ", linear by " in text
    told = json.loads(json.dumps(report.to_dict()))
    assert told["bytes_after"] == sum(row["bytes_after"] for row in told["rows"]) < told["bytes_before"]


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "mxfp4"])
def test_tied_weights_stay_tied(scheme):
    model = Model()
    lowp.quantize_(model, {"head": scheme})
    assert isinstance(model.head.weight, QTensor) and model.head.weight is model.embed.weight
    x = torch.randn(3, 128)
    assert relative_error(x @ model.embed.weight.dequantize().T, model.head(x)) < 1e-4
    lowp.dequantize_(model)
    assert model.head.weight is model.embed.weight and not isinstance(model.head.weight, QTensor)


def test_conv_conv1d_experts_and_embedding_compute_what_their_floats_do():
    model = Model()
    lowp.quantize_(model, {"conv": "int8", "gpt": "int8/row", "experts": "int8/row", "embed": "int8"})
    plain = lowp.dequantize_(copy.deepcopy(model))
    for name, x in {
        "conv": torch.randn(2, 4, 8, 8),
        "gpt": torch.randn(2, 3, 128),
        "experts": torch.randn(4, 5, 64),
        "embed": torch.randint(0, 96, (2, 3)),
    }.items():
        quantized, floats = model.get_submodule(name), plain.get_submodule(name)
        assert relative_error(floats(x), quantized(x)) < 1e-5, name
    one_expert = model.experts.up_proj[2]
    assert isinstance(one_expert, QTensor) and one_expert.shape == (64, 128)


def test_dtypes_stay(device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = nn.Sequential(nn.Linear(128, 128)).to(device, dtype)
        lowp.quantize_(model, "int4")
        assert model[0].weight.dtype == dtype and model(torch.randn(2, 128, device=device, dtype=dtype)).dtype == dtype


def test_a_device_that_is_not_here_is_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Linear(128, 64))
    with pytest.raises(SpellingError, match="cuda:99"):
        lowp.quantize_(model, "int4", device="cuda:99")
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.gpu
def test_device_moves_and_quantizes_one_weight_at_a_time():
    model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256)).bfloat16()
    lowp.quantize_(model, "int4", device="cuda")
    assert (
        model[0].weight.device.type == "cuda"
        and model[1].weight.device.type == "cuda"
        and model[0].weight.spec.layout != "plain"
    )
    assert model(torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)).isfinite().all()
    back = model.cpu()
    assert back[0].weight.spec.layout == "plain" and back(torch.randn(2, 256, dtype=torch.bfloat16)).isfinite().all()


def test_zero_rows_give_zeros_and_non_finite_weights_are_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight[3] = 0
        model[1].weight[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    with pytest.raises(MisfitError, match=r"1\.weight .* got 1 NaN and 2 infinite of 4096"):
        lowp.quantize_(model, "int8")
    assert not isinstance(model[0].weight, QTensor), "nothing is changed when an error is known beforehand"
    lowp.quantize_(model, {"0": "int8"})
    assert (model[0](torch.randn(2, 64))[:, 3] == 0).all()


def test_strict_refuses_before_anything_changes():
    model = Model()
    model.double()  # no kernel is written for it
    with pytest.raises(KernelError, match=r"lowp explain linear nf4"):
        lowp.quantize_(model, "nf4/1x64*bf16", strict=True)
    with pytest.raises(KernelError, match="fallback"):
        lowp.quantize_(model, "int8", strict=True)
    assert not any(isinstance(p, QTensor) for p in model.parameters())
    lowp.quantize_(nn.Sequential(nn.Linear(64, 64)).bfloat16(), "int8", strict=True)


def test_quantize_weight():
    weight = torch.randn(64, 128)
    q = quantize_weight(weight, "int4", name="w")
    assert q.spec.layout == "plain" and q.scheme == lowp.INT4
    with pytest.raises(QuantizedError):
        quantize_weight(q, "int4")
    with pytest.raises(MisfitError, match="w "):
        quantize_weight(weight / 0, "int4", name="w")
    assert quantize_weight(torch.randn(8, 4, 2, 2), "int8", kind="conv").shape == (8, 4, 2, 2)
    assert quantize_weight(torch.randn(128, 64), "int8", kind="conv1d").transposed


@pytest.mark.guest("transformers>=4.50")
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "mxfp8", "nvfp4", "nf4", "int8/row@int8/row"])
def test_a_hugging_face_model_generates(scheme):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 128, (1, 8))
    expected = model(ids).logits
    lowp.quantize_(model, {"lm_head": None, "*": scheme})
    assert relative_error(expected, model(ids).logits) < 0.4
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 12)


def test_a_method_of_your_own_chooses_the_numbers():
    def halves(weight, statistics, fmt):
        return quantize_given(weight, fmt, torch.full(fmt.scale_shape(tuple(weight.shape)), 0.5))

    own = Method(name="halves", about="every scale is a half", run=halves, why_not=lambda fmt: "")
    model = nn.Sequential(nn.Linear(64, 32))
    lowp.quantize_(model, "int8/row", method=own)
    assert (model[0].weight.parts().scale == 0.5).all()


def test_a_method_that_takes_any_number_is_given_them():
    seen = []

    def run(weight, statistics, fmt):
        seen.append(int(weight.isnan().sum()))
        return quantize(weight.nan_to_num(0.0), fmt)

    weight = torch.randn(64, 64)
    weight[3, 5] = float("nan")
    forgiving = Method(name="forgiving", about="", run=run, why_not=lambda fmt: "", takes_any=True)
    assert quantize_weight(weight, "int8/row", method=forgiving).dequantize().isfinite().all() and seen == [1]
    with pytest.raises(MisfitError, match="1 NaN"):
        quantize_weight(weight, "int8/row", method=dataclasses.replace(forgiving, takes_any=False))
