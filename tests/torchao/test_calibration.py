"""torchao's prepare, run, convert: AWQ, SmoothQuant and GPTQ by its names."""

import warnings

import pytest
import torch
from lowp.torchao.prototype.awq import AWQConfig
from lowp.torchao.prototype.gptq import GPTQConfig, gptq_quantize
from lowp.torchao.prototype.smoothquant import SmoothQuantConfig
from lowp.torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerTensor,
    quantize_,
)
from torch import nn

import lowp


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


def inputs():
    mix = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 512)
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(2)) @ mix
    x[:, ::64] *= 30
    return x


CASES = {
    "awq int4": (AWQConfig, Int4WeightOnlyConfig(group_size=32), ("prepare", "convert")),
    "gptq int4": (GPTQConfig, Int4WeightOnlyConfig(group_size=32), ("observe", "convert")),
    "gptq int8": (GPTQConfig, Int8WeightOnlyConfig(), ("observe", "convert")),
    "smoothquant int8": (SmoothQuantConfig, Int8DynamicActivationInt8WeightConfig(), ("prepare", "convert")),
}


@pytest.mark.parametrize("name", CASES)
def test_prepare_run_convert_beats_the_base_configuration(name):
    config, base, (first, second) = CASES[name]
    x, plain, model = inputs(), toy(), toy()
    expected = model(x)
    quantize_(plain, base)
    quantize_(model, config(base_config=base, step=first))
    assert torch.equal(model(x), expected)
    quantize_(model, config(base_config=base, step=second))
    assert type(model[0].weight) is type(plain[0].weight) and type(model[0]) is nn.Linear
    errors = [(m(x) - expected).norm() for m in (model, plain)]
    assert errors[0] < 0.9 * errors[1]
    if name != "smoothquant int8" and not name.startswith("gptq"):
        assert model[0].weight.act_pre_scale is not None


def test_int8_gptq_scales_a_row_by_the_whole_row():
    """torchao's takes the scale from the first 256 columns, so that a large one behind them is clipped."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)) * 0.02
    weight[:, 300] *= 10
    x = inputs()
    quantized = gptq_quantize(x.T @ x, weight, GPTQConfig(step="convert", base_config=Int8WeightOnlyConfig()))
    rounded = nn.Sequential(nn.Linear(512, 64, bias=False))
    rounded[0].weight = nn.Parameter(weight)
    quantize_(rounded, Int8WeightOnlyConfig())
    errors = [(x @ (q.dequantize() - weight).T).norm() for q in (quantized, rounded[0].weight)]
    assert errors[0] < 0.9 * errors[1]


def test_what_has_not_watched_is_an_error_that_says_what_to_do():
    with pytest.raises(lowp.LowpError, match="observe"):
        quantize_(toy(), GPTQConfig(step="convert", base_config=Int8WeightOnlyConfig()))
    with pytest.raises(lowp.LowpError, match="step"):
        AWQConfig(Int8WeightOnlyConfig(), step="later")


@pytest.mark.parametrize("config", [SmoothQuantConfig, AWQConfig, GPTQConfig])
def test_a_static_base_gets_the_scale_of_what_was_seen(config):
    """And is refused where nothing was seen, or where nobody gives it one: never dynamic in silence."""
    base = Int8StaticActivationInt8WeightConfig(granularity=PerTensor())
    model, x = toy(), inputs()
    first, second = ("observe", "convert") if config is GPTQConfig else ("prepare", "convert")
    quantize_(model, config(base_config=base, step=first))
    model(x)
    quantize_(model, config(base_config=base, step=second))
    weight = model[0].weight
    pre = 1.0 if weight.act_pre_scale is None else weight.act_pre_scale
    torch.testing.assert_close(weight.act_quant_scale.reshape(()), (x * pre).abs().max() / 127.5)
    unseen = toy()
    quantize_(unseen, config(base_config=base, step=first))
    with pytest.raises(lowp.LowpError, match="saw none"):
        quantize_(unseen, config(base_config=base, step=second))
    with pytest.raises(lowp.LowpError, match="wants act_quant_scale"):
        quantize_(toy(), base)


def test_what_is_not_followed_warns():
    with pytest.warns(UserWarning, match="scale_search_space_size=7"):
        AWQConfig(Int8WeightOnlyConfig(), scale_search_space_size=7)
    with pytest.warns(UserWarning, match="activation_value_ub=1.0"):
        Float8DynamicActivationFloat8WeightConfig(activation_value_ub=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Float8DynamicActivationFloat8WeightConfig(activation_value_lb=1e-12)
