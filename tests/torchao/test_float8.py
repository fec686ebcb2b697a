"""torchao's names for training: a configuration is the recipe that it says, and the layers train."""

import copy

import pytest
import torch
from lowp.torchao.quantization import quantize_
from torch import nn

from lowp.errors import MisfitError
from lowp.torchao.float8_training import (
    CastConfig,
    Float8Linear,
    Float8LinearConfig,
    ScalingGranularity,
    ScalingType,
    _auto_filter_for_recipe,
    amax_to_scale,
    convert_to_float8_training,
    swap_linear_layers,
    tensor_to_scale,
    to_fp8_saturated,
)
from lowp.torchao.trained import (
    BitNetTrainingConfig,
    Float8TrainingOpConfig,
    Int8MixedPrecisionTrainingConfig,
    MXFP8TrainingOpConfig,
    MXFP8TrainingRecipe,
    _to_fp8_rowwise_then_scaled_grouped_mm,
    quantize_bitnet_weight,
    quantize_int8_rowwise,
)
from lowp.train import RECIPES, Linear, grouped_linear


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("tensorwise", "float8_tensorwise"),
        ("rowwise", "float8_rowwise"),
    ],
)
def test_their_recipes_are_rows_of_ours(theirs, ours):
    assert Float8LinearConfig.from_recipe_name(theirs).recipe() == RECIPES[ours]


def test_rowwise_with_gw_hp_has_scales_of_powers_of_two():
    recipe = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp").recipe()
    assert recipe.output == RECIPES["float8_rowwise"].output and recipe.grad_weight == ""
    assert recipe.grad_input == "e4m3/tensor*e8m0@e4m3/row*e8m0"
    ours = RECIPES["float8_rowwise_gw_hp"]  # the row of this name has scales in fp32
    assert recipe != ours and all(
        getattr(recipe, product) == getattr(ours.power_of_two(), product)
        for product in ("output", "grad_input", "grad_weight", "stochastic", "fast")
    )


def test_a_configuration_is_a_recipe():
    power = Float8LinearConfig(round_scales_to_power_of_2=True).recipe()
    assert power.output == "e4m3/tensor*e8m0@e4m3/tensor*e8m0" and power.grad_input.endswith("@e5m2/tensor*e8m0")
    axis = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE)
    assert Float8LinearConfig(cast_config_input=axis).recipe().output == "e4m3/tensor@e4m3/row"
    off = CastConfig(scaling_type=ScalingType.DISABLED)
    with pytest.raises(MisfitError, match="both operands of a product cast or neither"):
        Float8LinearConfig(cast_config_input=off)
    both = Float8LinearConfig(cast_config_input_for_grad_weight=off, cast_config_grad_output_for_grad_weight=off)
    assert both.recipe().grad_weight == ""


def test_layers_are_converted_in_place_and_train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 10), nn.Linear(64, 64))
    ids = [id(p) for p in model.parameters()]
    made = convert_to_float8_training(model, module_filter_fn=lambda module, fqn: fqn != "4")
    assert made is model and [id(p) for p in model.parameters()] == ids
    assert [type(m).__name__ for m in model] == ["Float8Linear", "GELU", "Float8Linear", "Linear", "Linear"]
    assert type(model[4]) is nn.Linear
    assert repr(model[0]).endswith("cast_configs=i:dyn_ten_e4m3,w:dyn_ten_e4m3,go:dyn_ten_e5m2)")
    x, optimizer, losses = torch.randn(32, 64), torch.optim.Adam(model[:3].parameters(), lr=1e-3), []
    for _ in range(30):
        loss = (model[:3](x) - x.flip(0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    rowwise = Float8LinearConfig.from_recipe_name("rowwise")
    assert Float8Linear(32, 48, bias=False, config=rowwise).recipe == RECIPES["float8_rowwise"]
    root = nn.Linear(32, 32)
    assert convert_to_float8_training(root) is root and isinstance(root, Float8Linear)
    swapped = swap_linear_layers(nn.Sequential(nn.Linear(16, 16)), lambda layer: nn.Identity())
    assert type(swapped[0]) is nn.Identity


def test_their_filter():
    keep = _auto_filter_for_recipe("rowwise", ["output"])
    large, small = nn.Linear(8192, 8192, device="meta"), nn.Linear(1024, 8192, device="meta")
    assert keep(large, "layers.0.w1") and not keep(large, "output") and not keep(small, "layers.0.wk")
    assert not keep(nn.Linear(8192, 8200, device="meta"), "x") and not keep(nn.ReLU(), "x")
    assert _auto_filter_for_recipe("tensorwise", [])(small, "layers.0.wk")


def test_their_scales_multiply():
    assert amax_to_scale(torch.tensor(0.0), torch.float8_e4m3fn).isfinite()
    assert amax_to_scale(torch.tensor([6.0, 7.0]), torch.float8_e4m3fn, True).tolist() == [64, 64]
    above = torch.nextafter(torch.tensor(7.0), torch.tensor(8.0))
    assert amax_to_scale(above, torch.float8_e4m3fn, True) == 32, "times 64 it would be beyond 448"
    x = torch.randn(8, 16)
    scale = tensor_to_scale(x, torch.float8_e4m3fn, scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=-1)
    assert scale.shape == (8, 1) and to_fp8_saturated(x * scale, torch.float8_e4m3fn).float().abs().max() == 448
    codes, scale = quantize_int8_rowwise(x)
    assert torch.equal(codes, (x / scale[:, None]).round().to(torch.int8)) and codes.abs().amax() == 127
    assert set(quantize_bitnet_weight(x, x.abs().mean()).flatten().tolist()) == {-1, 0, 1}


def test_their_configuration_of_float8_training_is_read():
    assert Float8TrainingOpConfig().recipe() == RECIPES["float8_rowwise"]
    assert Float8TrainingOpConfig(float8_linear_recipe="tensorwise").recipe() == RECIPES["float8_tensorwise"]
    for wrong in ({"float8_linear_recipe": "rowwise_with_gw_hp"}, {"float8_dtype": torch.float8_e5m2}):
        with pytest.raises(MisfitError, match=f"wants {next(iter(wrong))} "):
            Float8TrainingOpConfig(**wrong).recipe()


@pytest.mark.parametrize(
    "config",
    [
        Int8MixedPrecisionTrainingConfig(), Int8MixedPrecisionTrainingConfig(grad_weight=False), BitNetTrainingConfig(),
        MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_RCEIL_WGRAD_WITH_HP), Float8TrainingOpConfig(),
    ],
    ids=lambda config: type(config).__name__,
)  # fmt: skip
def test_quantize_takes_their_configurations_of_training(config):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    plain = copy.deepcopy(model)
    quantize_(model, config, lambda module, fqn: fqn == "0")
    assert isinstance(model[0], Linear) and type(model[1]) is nn.Linear and type(model[0].weight) is nn.Parameter
    x = torch.randn(8, 64)
    y = model(x)
    y.sum().backward()
    assert model[0].weight.grad.isfinite().all() and 0 < (y - plain(x)).norm() / y.norm() < 0.7


def test_their_grouped_products():
    x, w = torch.randn(24, 32).bfloat16(), torch.randn(2, 48, 32).bfloat16()
    offs = torch.tensor([7, 24], dtype=torch.int32)
    y = _to_fp8_rowwise_then_scaled_grouped_mm(x, w.transpose(-2, -1), offs)
    assert y.dtype == torch.bfloat16 and torch.equal(y, grouped_linear(x, w, offs, "float8_rowwise"))
    with pytest.raises(MisfitError, match="wants offs"):
        _to_fp8_rowwise_then_scaled_grouped_mm(x, w.transpose(-2, -1))
    weight = w.detach().clone().requires_grad_()
    recipe = MXFP8TrainingOpConfig(wgrad_with_hp=True).recipe()
    grouped_linear(x, weight, offs, recipe).sum().backward()
    assert torch.allclose(weight.grad[0].float(), x[:7].float().sum(0).expand(48, 32), rtol=0.02, atol=0.02)


def test_a_layer_made_as_mxfp8_is_the_one_that_is_converted_to_it():
    from lowp.torchao.prototype.moe_training.config import MXFP8TrainingOpConfig
    from lowp.torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear

    class Mine(MXFP8Linear):
        pass

    for hp in (False, True):
        torch.manual_seed(0)
        made = Mine(64, 32, bias=False, wgrad_with_hp=hp)
        converted = nn.Sequential(nn.Linear(64, 32, bias=False))
        converted[0].weight.data.copy_(made.weight.data)
        quantize_(converted, MXFP8TrainingOpConfig(wgrad_with_hp=hp))
        x = torch.randn(32, 64)
        y, expected = made(x), converted(x)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(y, expected) and torch.equal(made.weight.grad, converted[0].weight.grad)
        assert not torch.equal(y, x @ made.weight.T) and made.recipe.grad_weight == ("" if hp else made.recipe.output)


def test_a_grouped_product_by_a_configuration():
    from lowp.torchao.prototype.moe_training.config import Float8TrainingOpConfig
    from lowp.torchao.prototype.moe_training.utils import _quantize_then_scaled_grouped_mm

    x, w = torch.randn(32, 64).bfloat16(), torch.randn(2, 48, 64).bfloat16()
    offs = torch.tensor([16, 32], dtype=torch.int32)
    y = _quantize_then_scaled_grouped_mm(x, w.transpose(-2, -1), Float8TrainingOpConfig(), offs)
    expected = torch.cat((x[:16] @ w[0].T, x[16:] @ w[1].T)).float()
    assert y.dtype is torch.bfloat16 and 0 < (y - expected).norm() / expected.norm() < 0.06
    with pytest.raises(MisfitError, match="no bias"):
        _quantize_then_scaled_grouped_mm(x, w.transpose(-2, -1), Float8TrainingOpConfig(), offs, torch.zeros(48))
