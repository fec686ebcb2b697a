"""quantize_: which layers a configuration reaches, and what torchao does in silence or wrongly and lowp does not."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowp.errors import MisfitError
from lowp.numerics.compare import relative_error
from lowp.tensor import QTensor
from lowp.torchao.apply import (
    HANDLERS,
    TENSORS,
    fqn_matches_fqn_config,
    is_linear,
    quantize_,
    register_quantize_module_handler,
    replace_modules,
    swap_conv2d_1x1_to_linear,
)
from lowp.torchao.config import CONFIG_ROWS, CONFIGS, AOBaseConfig, FqnToConfig
from lowp.torchao.words import MappingType, PerGroup, PerRow

Int8 = CONFIGS["Int8WeightOnlyConfig"]
Int4 = CONFIGS["Int4WeightOnlyConfig"]
ACTIVATIONS = ("Int8DynamicActivationInt8WeightConfig", "Float8DynamicActivationFloat8WeightConfig")


class Tree(nn.Module):
    """Two blocks of two layers, an embedding tied to the head, a stack of experts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(64, 64), "up": nn.Linear(64, 64)}) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(2, 64, 64))
        self.head = nn.Linear(64, 128, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + F.gelu(block["up"](block["q"](x)))
        return self.head(x)


def quantized(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, QTensor)}


def test_linear_layers_are_what_is_quantized():
    model = Tree()
    report = quantize_(model, Int8())
    linear = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("q", "up")}
    assert quantized(model) == linear | {"head.weight", "embed.weight"}
    assert model.head.weight is model.embed.weight, "tied weights stay tied"
    assert {row.fqn for row in report.rows if row.scheme} == linear | {"embed.weight"}
    assert "linear by " in str(report)


def test_a_filter_says_which_layers():
    model = Tree()
    quantize_(model, Int8(), lambda module, name: isinstance(module, nn.Linear) and name.endswith(".q"))
    assert quantized(model) == {"blocks.0.q.weight", "blocks.1.q.weight"}
    quantize_(model, CONFIGS["IntxWeightOnlyConfig"](), lambda module, name: isinstance(module, nn.Embedding))
    assert "embed.weight" in quantized(model)
    layer = nn.Linear(64, 64)
    quantize_(layer, Int8(), lambda module, name: True)  # what transformers asks for one layer at a time
    assert isinstance(layer.weight, TENSORS["Int8Tensor"])
    with pytest.raises(MisfitError, match="has no weight"):
        quantize_(nn.Sequential(nn.GELU()), Int8(), lambda module, name: isinstance(module, nn.GELU))
    with pytest.raises(MisfitError, match=r"a spelling goes to lowp\.quantize_"):
        quantize_(Tree(), "int8")


def test_what_is_quantized_is_no_linear_layer_in_floats():
    model = Tree()
    quantize_(model, Int8())
    assert not any(is_linear(module) for module in model.modules())
    quantize_(model, Int8())  # nothing is left to do
    attention = nn.MultiheadAttention(64, 4)
    quantize_(attention, Int8())
    assert not quantized(attention), "its projection is read by another way than forward"


# -- by name ------------------------------------------------------------------------------------------------------------------


def test_mappings_by_name():
    model = Tree()
    config = FqnToConfig(
        {
            "blocks.0.q.weight": Int4(group_size=32),  # a parameter comes before its module
            "blocks.0.q": Int8(),
            r"re:blocks\.\d+\.up": CONFIGS["IntxWeightOnlyConfig"](weight_dtype=torch.int4, granularity=PerGroup(32)),
            "experts": CONFIGS["Float8WeightOnlyConfig"](),
        }
    )
    quantize_(model, config, filter_fn=None)
    kinds = {name: type(p).__name__ for name, p in model.named_parameters() if isinstance(p, QTensor)}
    assert kinds == {
        "blocks.0.q.weight": "Int4Tensor",
        "blocks.0.up.weight": "IntxUnpackedToInt8Tensor",
        "blocks.1.up.weight": "IntxUnpackedToInt8Tensor",
        "experts": "Float8Tensor",
    }


def test_two_nones_keep_two_layers():
    """torchao's mapping with two None entries quantizes one of them."""
    model = Tree()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = FqnToConfig({"blocks.0.q": None, "re:.*up": None, "head": None, "_default": Int8()})
    quantize_(model, config)
    assert quantized(model) == {"blocks.1.q.weight"}


@pytest.mark.parametrize(
    ("name", "matches"), [("a.b", True), ("c.7.d", True), ("c.x.d", False), ("a", False), ("a.b.c", False)]
)
def test_names_match(name, matches):
    assert fqn_matches_fqn_config(name, FqnToConfig({"a.b": None, r"re:c\.\d\.d": Int8()})) is matches


# -- handlers of third parties ------------------------------------------------------------------------------------------------


def test_a_third_party_brings_a_configuration(monkeypatch):
    class Scaled(AOBaseConfig):
        def __init__(self, by):
            self.by = by

    monkeypatch.setattr("lowp.torchao.apply.HANDLERS", dict(HANDLERS))

    @register_quantize_module_handler(Scaled)
    def _(module, config):
        module.weight = nn.Parameter(module.weight * config.by)
        return module

    model = Tree()
    before = copy.deepcopy(model)
    quantize_(model, Scaled(2.0), lambda module, name: name == "blocks.0.q")
    assert torch.equal(model.blocks[0]["q"].weight, before.blocks[0]["q"].weight * 2)
    quantize_(model, FqnToConfig({"blocks.1.q": Scaled(3.0), "blocks.1.up": Int8()}))
    assert torch.equal(model.blocks[1]["q"].weight, before.blocks[1]["q"].weight * 3)
    assert quantized(model) == {"blocks.1.up.weight"}


def test_modules_are_replaced_by_a_filter():
    model = Tree()
    replace_modules(
        model, lambda module, width: nn.Linear(width, 1), lambda module, name: name == "blocks.1.up", extra_args=(7,)
    )
    assert model.blocks[1]["up"].in_features == 7 and model.blocks[0]["up"].in_features == 64


def test_one_by_one_convolutions_become_linear():
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 8, 3))
    x = torch.randn(2, 16, 5, 5)
    expected = model(x)
    swap_conv2d_1x1_to_linear(model)
    assert torch.allclose(model(x), expected, atol=1e-5) and isinstance(model[1], nn.Conv2d)
    quantize_(model, Int8())
    assert quantized(model) == {"0.linear.weight"}


# -- known faults of torchao, none of them here ---------------------------------------------------------------------------------


def test_int4_says_which_layer_its_group_does_not_divide():
    """torchao leaves such a layer in floats and says nothing."""
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 96))
    with pytest.warns(UserWarning, match=r"leaves 1 layers in floats\. 1\.weight"):
        report = quantize_(model, Int4(group_size=128))
    assert quantized(model) == {"0.weight"}
    assert next(row for row in report.rows if row.fqn == "1.weight").why.startswith("skipped")
    with pytest.raises(MisfitError, match="multiples"):
        quantize_(nn.Linear(64, 96), CONFIGS["IntxWeightOnlyConfig"](granularity=PerGroup(128)))


@pytest.mark.parametrize("row", [row for row in CONFIG_ROWS if "Static" not in row.name], ids=lambda row: row.name)
def test_rows_of_zeros_are_no_nan(row):
    """torchao's float8 and NVFP4 give NaN."""
    model = nn.Sequential(nn.Linear(256, 128)).bfloat16()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[1] = 1.0
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    x[0] = 0
    quantize_(model, row_config(row))
    with torch.no_grad():
        y = model(x) - model[0].bias
    assert y.isfinite().all() and y[:, 0].abs().max() < 0.05 and y[0].abs().max() < 0.05


def row_config(row):
    return CONFIGS[row.name]()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float16_does_not_overflow(name):
    """torchao multiplies the integer sum by one scale in float16 first."""
    layer = nn.Linear(4096, 64, bias=False).half()
    with torch.no_grad():
        layer.weight.fill_(1e-3)
    x = torch.full((2, 4096), 100.0, dtype=torch.float16)
    quantize_(layer, CONFIGS[name](granularity=PerRow()), lambda module, fqn: True)
    with torch.no_grad():
        assert relative_error(torch.full((2, 64), 409.6), layer(x).float()) < 0.02


@pytest.mark.parametrize("row", CONFIG_ROWS, ids=lambda row: row.name)
def test_to_float16_is_heard(row):
    """torchao's int8 and int4 weights keep their dtype."""
    model = nn.Sequential(nn.Linear(256, 128)).bfloat16()
    quantize_(model, row_config(row) if "Static" not in row.name else CONFIGS[row.name](act_quant_scale=torch.ones(())))
    model.half()
    assert model[0].weight.dtype == torch.float16
    with torch.no_grad():
        assert model(torch.randn(2, 256, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_splitting_float8_leaves_its_parent_alone(granularity):
    """torchao's split writes into the parent's scale."""
    from lowp.torchao import words

    w = TENSORS["Float8Tensor"].from_hp(torch.randn(64, 32), granularity=getattr(words, granularity)())
    before = w.dequantize()
    parts = w.split(16)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), before)
    assert torch.equal(w.dequantize(), before)


def test_gguf_rounds_the_weight():
    """torchao's keeps the floats."""
    layer = nn.Linear(256, 64)
    before = layer.weight.detach().clone()
    quantize_(layer, CONFIGS["GGUFWeightOnlyConfig"](), lambda module, name: True)
    assert 0.02 < relative_error(before, layer.weight.dequantize()) < 0.12
    assert layer.weight.packed["qdata"].dtype == torch.uint8 and layer.weight.packed_nbytes < before.nbytes / 6


@pytest.mark.parametrize("name", [row.name for row in CONFIG_ROWS if "Static" not in row.name])
def test_adapters_get_gradients_over_every_weight(name):
    """torchao's int8 dynamic weights give the adapter none."""
    base = nn.Linear(256, 128).bfloat16().requires_grad_(False)
    quantize_(base, CONFIGS[name](), lambda module, fqn: True)
    down, up = nn.Linear(256, 4, bias=False).bfloat16(), nn.Linear(256, 256).bfloat16()
    x = torch.randn(8, 256, dtype=torch.bfloat16)
    base(up(x)).float().square().mean().backward()
    expected = torch.autograd.grad(
        F.linear(up(x), base.weight.dequantize(), base.bias).float().square().mean(), up.weight
    )[0]
    assert relative_error(expected, up.weight.grad) < 0.3 and down.weight.grad is None


def test_a_symmetric_bit_is_refused():
    """One signed bit holds -1 and 0: half of the weights would vanish."""
    with pytest.raises(MisfitError, match="int1 holds only -1 and 0"):
        quantize_(nn.Linear(64, 64), CONFIGS["IntxWeightOnlyConfig"](weight_dtype=torch.int1), lambda m, n: True)
    layer = nn.Linear(64, 64)
    quantize_(
        layer, CONFIGS["IntxWeightOnlyConfig"](torch.int1, PerGroup(32), MappingType.ASYMMETRIC), lambda m, n: True
    )
    assert isinstance(layer.weight, TENSORS["IntxUnpackedToInt8Tensor"])


@pytest.mark.parametrize("row", CONFIG_ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_that_is_filled_later_can_be_quantized(row, dtype):
    """As vLLM loads: quantize what torch.empty left there, then copy quantized weights into slices of it."""
    config = row_config(row) if "Static" not in row.name else CONFIGS[row.name](act_quant_scale=torch.ones(()))
    every = lambda module, name: True  # noqa: E731
    junk = torch.randint(-(2**15), 2**15, (256, 256 * dtype.itemsize // 2), dtype=torch.int16).view(dtype)
    junk[7, :5] = float("nan")
    place, halves = nn.Linear(256, 256, False, dtype=dtype), [nn.Linear(256, 128, False, dtype=dtype) for _ in range(2)]
    place.weight = nn.Parameter(junk.clone(), requires_grad=False)
    with pytest.warns(UserWarning, match=f"{row.name} takes .* for 0"):
        quantize_(place, config, every)
    for half in halves:
        quantize_(half, config, every)
    if place.weight.format.block == "tensor" or place.weight.format.nested or "/tensor" in str(place.weight.format):
        return  # one scale for all rows: no such weight is loaded by halves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layouts that cannot be cut
        for i, half in enumerate(halves):
            place.weight.data.narrow(0, 128 * i, 128).copy_(half.weight)
    assert torch.equal(place.weight.dequantize(), torch.cat([half.weight.dequantize() for half in halves]))


def test_no_filter_means_linear_layers():
    """As torchao reads filter_fn=None, which hosts pass."""
    model = nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 32), nn.Conv2d(32, 32, 1))
    quantize_(model, CONFIGS["IntxWeightOnlyConfig"](), filter_fn=None)
    assert [isinstance(module.weight, QTensor) for module in model] == [False, True, False]
