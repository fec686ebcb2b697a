"""QAT by torchao's words: what is trained is what the base configuration stores; gradients are straight through, float8's too."""

import copy

import pytest
import torch
from lowp.torchao.prototype import _nf4tensor_api as prototype_nf4
from lowp.torchao.quantization import quantize_
from lowp.torchao.quantization.prototype import qat as prototype_qat
from lowp.torchao.quantization.qat import (
    ComposableQATQuantizer,
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    FakeQuantizerBase,
    Float8FakeQuantizeConfig,
    FromIntXQuantizationAwareTrainingConfig,
    Int4WeightOnlyEmbeddingQATQuantizer,
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATQuantizer,
    IntxFakeQuantizeConfig,
    IntxFakeQuantizer,
    IntXQuantizationAwareTrainingConfig,
    QATConfig,
    initialize_fake_quantizers,
)
from lowp.torchao.quantization.qat.linear import disable_8da4w_fake_quant, enable_8da4w_fake_quant
from torch import nn

from lowp.errors import MisfitError
from lowp.torchao import quantization as q

BASES = {
    "8da4w": lambda: q.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=q.PerGroup(32)
    ),
    "int4": lambda: q.Int4WeightOnlyConfig(group_size=32),
    "int4 tiles": lambda: q.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"),
    "float8": lambda: q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerRow()),
    "float8 int4": lambda: q.Float8DynamicActivationInt4WeightConfig(),
    "intx": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=q.PerGroup(32)),
    "int8": lambda: q.Int8WeightOnlyConfig(),
    "int8 dynamic": lambda: q.Int8DynamicActivationInt8WeightConfig(),
}
INT4 = IntxFakeQuantizeConfig(torch.int4, group_size=32)


def small(dtype=torch.float32):
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_prepare_train_convert(base, dtype):
    model, config = small(dtype), BASES[base]()
    floats, x = copy.deepcopy(model), torch.randn(8, 128, dtype=dtype)
    quantize_(model, QATConfig(config, step="prepare"))
    assert isinstance(model[0], FakeQuantizedLinear) and list(model.state_dict()) == list(floats.state_dict())
    y = model(x)
    y.backward(grad := torch.randn_like(y))
    shown = model[0].weight_fake_quantizer(model[0].weight)
    # whoever is not clamped gets the gradient of the product, nothing gets another
    inner = model[2].activation_fake_quantizer
    hidden = torch.relu(model[0](x)).detach()
    full = grad.T @ (hidden if inner is None else inner(hidden))
    mine = model[2].weight.grad
    assert torch.where(mine == 0, True, (mine - full).abs() <= 2e-2 * full.abs().max()).all()
    assert (mine != 0).float().mean() > 0.95 * (full != 0).float().mean()
    assert model[2].bias.grad is not None
    quantize_(model, QATConfig(config, step="convert"))
    quantize_(floats, config)
    assert type(model[0]) is nn.Linear and type(model[0].weight) is type(floats[0].weight)
    assert torch.equal(model[0].weight.dequantize(), shown) and torch.equal(model(x), floats(x))
    assert (model(x) - y).norm() < 0.02 * y.norm()


@pytest.mark.parametrize("granularity", [q.PerRow(), q.PerTensor()], ids=str)
def test_float8_keeps_its_gradients(granularity):
    """torchao 0.18 casts the gradient itself to float8 and sends nearly all of small ones to zero."""
    model, config = small(), Float8FakeQuantizeConfig(granularity=granularity)
    quantize_(model, QATConfig(activation_config=config, weight_config=config, step="prepare"))
    x = torch.randn(8, 128, requires_grad=True)
    (model(x).sum() * 1e-6).backward()
    assert all((p.grad != 0).float().mean() > 0.3 for p in model.parameters())
    assert (x.grad != 0).all() and (model[2].weight.grad != 0).any(1).all()


def test_a_fake_quantizer_by_itself_is_that_of_a_layer():
    from lowp.torchao.quantization.qat import IntxFakeQuantizer

    model = small()
    quantize_(model, QATConfig(weight_config=INT4, step="prepare"))
    weight = model[0].weight
    assert torch.equal(IntxFakeQuantizer.from_config(INT4)(weight), model[0].weight_fake_quantizer(weight))


def test_own_configurations_and_switches():
    model, x = small(), torch.randn(4, 128)
    floats = copy.deepcopy(model)
    act = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    quantize_(model, QATConfig(activation_config=act, weight_config=INT4, step="prepare"))
    assert model[0].weight_fake_quantizer.config.group_size == 32 and not act.is_symmetric
    assert not torch.equal(model(x), floats(x))
    model[0].disable_fake_quant()
    model[2].disable_fake_quant()
    assert torch.equal(model(x), floats(x))
    quantize_(model, FromIntXQuantizationAwareTrainingConfig())
    assert type(model[0]) is nn.Linear and torch.equal(model(x), floats(x))
    quantize_(model, IntXQuantizationAwareTrainingConfig(act, INT4))
    assert isinstance(model[2], FakeQuantizedLinear)


def test_embeddings():
    model = nn.Sequential(nn.Embedding(16, 64))
    quantize_(model, QATConfig(weight_config=INT4, step="prepare"), lambda m, name: isinstance(m, nn.Embedding))
    assert isinstance(model[0], FakeQuantizedEmbedding)
    ids = torch.arange(5)
    y = model(ids)
    y.sum().backward()
    base = q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))
    quantize_(model, QATConfig(base, step="convert"), lambda m, name: isinstance(m, nn.Embedding))
    assert type(model[0]) is nn.Embedding and torch.equal(model(ids), y)


def test_learned_ranges_are_stored():
    config = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False, range_learning=True)
    model, x = small(), torch.randn(4, 128)
    quantize_(model, QATConfig(weight_config=config, step="prepare"))
    initialize_fake_quantizers(model, (x,))
    scale = model[0].weight_fake_quantizer.scale
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = scale.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(scale, before) and any("scale" in name for name in model.state_dict())
    y = model(x)
    base = q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))
    quantize_(model, QATConfig(base, step="convert"))
    assert type(model[0].weight).__name__ == "IntxUnpackedToInt8Tensor"
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        (lambda: Int8DynActInt4WeightQATQuantizer(groupsize=32), torch.float32),
        (lambda: Int4WeightOnlyQATQuantizer(groupsize=32), torch.bfloat16),
    ],
    ids=["8da4w", "4w"],
)  # fmt: skip
def test_quantizers_of_the_first_kind(quantizer, dtype):
    model, x = nn.Sequential(nn.Embedding(128, 128), *small()).to(dtype), torch.arange(9)
    model = ComposableQATQuantizer([quantizer(), Int4WeightOnlyEmbeddingQATQuantizer(group_size=32)]).prepare(model)
    assert isinstance(model[1], FakeQuantizedLinear) and isinstance(model[0], FakeQuantizedEmbedding)
    y = model(x)
    y.float().sum().backward()
    both = ComposableQATQuantizer([quantizer(), Int4WeightOnlyEmbeddingQATQuantizer(group_size=32)])
    model = both.convert(model)
    assert type(model[1]) is nn.Linear and type(model[0]) is nn.Embedding
    assert (model(x) - y).float().norm() < 0.02 * y.float().norm()


def test_torchtunes_switches():
    model = Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(small())
    x = torch.randn(2, 128)
    on = model(x)
    model.apply(disable_8da4w_fake_quant)
    off = model(x)
    model.apply(enable_8da4w_fake_quant)
    assert torch.equal(model(x), on) and not torch.equal(on, off)
    assert prototype_qat.Int8DynActInt4WeightQATQuantizer is Int8DynActInt4WeightQATQuantizer


def test_mx_and_nvfp4():
    from lowp.torchao.prototype.qat import MXFakeQuantizeConfig, NVFP4FakeQuantizeConfig

    for config in (MXFakeQuantizeConfig(), NVFP4FakeQuantizeConfig()):
        model = small()
        quantize_(model, QATConfig(activation_config=config, weight_config=config, step="prepare"))
        model(torch.randn(4, 128)).sum().backward()
        assert type(model[0]).__name__ == type(config).__name__.replace("FakeQuantizeConfig", "FakeQuantizedLinear")
        assert (model[0].weight.grad != 0).any() and model[0].bias.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: QATConfig(),
        lambda: QATConfig(INT4),
        lambda: QATConfig(q.Int8WeightOnlyConfig(), weight_config=INT4),
        lambda: QATConfig(weight_config=INT4, step="convert"),
        lambda: QATConfig(q.Int8WeightOnlyConfig(), step="train"),
        lambda: IntxFakeQuantizeConfig(torch.int4, "per_group"),
        lambda: IntxFakeQuantizeConfig(torch.float16, "per_token"),
        lambda: IntxFakeQuantizeConfig(torch.int4, group_size=32, range_learning=True),
        lambda: Float8FakeQuantizeConfig(hp_value_lb=1.0),
        lambda: IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False),
        lambda: IntxFakeQuantizeConfig(torch.int4, group_size=32, eps=1.0),
        lambda: IntxFakeQuantizeConfig(torch.int8, group_size=32, zero_point_domain=q.ZeroPointDomain.FLOAT),
        lambda: quantize_(small(), QATConfig(prototype_nf4.NF4WeightOnlyConfig())),
        lambda: quantize_(nn.Sequential(nn.Conv2d(1, 1, 1)), QATConfig(weight_config=INT4), lambda m, n: n == "0"),
    ],
)
def test_refusals_are_sentences(make):
    with pytest.raises(MisfitError):
        make()


@pytest.mark.parametrize("mapping", list(q.MappingType), ids=str)
def test_a_fake_quantizer_made_by_its_class_has_its_configurations_numbers(mapping):
    config = IntxFakeQuantizeConfig(torch.int4, q.PerGroup(32), mapping)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(IntxFakeQuantizer(config)(x), FakeQuantizerBase.from_config(config)(x))
