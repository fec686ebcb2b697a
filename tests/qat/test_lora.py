"""LoRA with QAT on the merged weight, over frozen bases of all kinds; PEFT's adapters over quantized bases."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowp
from lowp import qat
from lowp.errors import MisfitError
from lowp.numerics import Format, dequantize, quantize
from lowp.ops import fake_quantize
from lowp.tensor import QTensor

INT4, CLAMPED = (
    "int4/1x32*bf16",
    "int4/1x32*bf16+bf16",
)  # the second can clamp: its gradient is masked


def prepared(scheme, **options):
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32))
    floats = copy.deepcopy(model)
    qat.prepare(model, scheme, lora=qat.Lora(rank=4, alpha=8, **options))
    with torch.no_grad():
        for layer in model:
            layer.fake_weight.lora_b.normal_(std=0.05)
    return model, floats


@pytest.mark.parametrize("act", ["", "@int8/row"])
@pytest.mark.parametrize("base", [None, "nf4/1x64*bf16", "int4/1x32", "nf4/1x64*int8/1x256"])
@pytest.mark.parametrize("scheme", [INT4, CLAMPED])
def test_values_and_gradients_are_those_of_the_merged_weight(scheme, base, act, device):
    model, floats = prepared(scheme + act, base=base)
    model, x = model.to(device), torch.randn(2, 3, 128, device=device, requires_grad=True)
    assert isinstance(model[0].weight, QTensor) == bool(base) and not model[0].weight.requires_grad
    y = model[0](x)
    grad = torch.randn_like(y)
    y.backward(grad)

    fake, fmt = model[0].fake_weight, Format.parse(scheme)
    start = floats[0].weight.detach().to(device)
    start = dequantize(quantize(start, Format.parse(base)), Format.parse(base)) if base else start
    a, b, x2 = (t.detach().clone().requires_grad_() for t in (fake.lora_a, fake.lora_b, x))
    seen = x2 if not act else fake_quantize(x2.reshape(-1, 128), Format.parse("int8/row")).reshape(x.shape)
    wanted = F.linear(seen, fake_quantize(start + 2 * (b @ a), fmt), model[0].bias)
    wanted.backward(grad)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    for mine, theirs in ((fake.lora_a.grad, a.grad), (fake.lora_b.grad, b.grad), (x.grad, x2.grad)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert model[0].weight.grad is None


@pytest.mark.parametrize("base", [None, "nf4/1x64*bf16"])
def test_convert_leaves_one_quantized_weight_that_says_the_same(base):
    model, _ = prepared(INT4 + "@int8/row", base=base)
    x = torch.randn(4, 128)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        wanted, merged = model(x), model[0].fake_weight(model[0].weight)
    report = qat.convert(model)
    assert type(model[0]) is nn.Linear and [row.scheme for row in report.rows] == [INT4 + "@int8/row"] * 2
    assert torch.equal(model[0].weight.dequantize(), merged)
    assert (model(x) - wanted).norm() < 1e-4 * wanted.norm()


def test_nothing_of_the_weights_size_is_saved_and_only_adapters_learn():
    model, _ = prepared(INT4)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.shape, t.data_ptr())) or t, lambda t: t):
        model[0](torch.randn(4, 128, requires_grad=True))
    weight = model[0].weight
    assert all(pointer == weight.data_ptr() for shape, pointer in sizes if shape == weight.shape)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.rpartition(".")[2] for name in learning} == {"lora_a", "lora_b", "bias"}


def test_switched_off_it_is_lora_and_autocast_computes_low():
    model, floats = prepared(INT4)
    x = torch.randn(4, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model[0](x)
    assert low.dtype == torch.bfloat16 and (low - model[0](x)).norm() < 0.02 * low.norm()
    qat.disable(model)
    fake = model[0].fake_weight
    torch.testing.assert_close(
        model[0](x), floats[0](x) + 2 * (x @ fake.lora_a.T) @ fake.lora_b.T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scheme", [INT4, CLAMPED, "int4/1x32~mse"])
def test_autocast_trains_the_weights_that_are_kept(scheme):
    model, _ = prepared(scheme)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shown = model[0].fake_weight(model[0].weight).float()
    qat.convert(model)
    assert torch.equal(model[0].weight.dequantize(), shown)


def test_a_subclass_keeps_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model, x = nn.Sequential(Doubled(64, 32)), torch.randn(3, 64)
    qat.prepare(model, INT4, lora=qat.Lora(rank=2))
    y = model(x)
    y.sum().backward()
    assert model[0].fake_weight.lora_b.grad.abs().sum() > 0
    qat.convert(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_compiles_to_one_graph():
    model, _ = prepared(INT4)
    x = torch.randn(4, 128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, eager)


def test_refusals_are_sentences():
    with pytest.raises(MisfitError, match="rank"):
        qat.prepare(nn.Sequential(nn.Linear(32, 32)), INT4, lora=qat.Lora(rank=0))
    with pytest.raises(MisfitError, match="exclude"):
        qat.prepare(nn.Sequential(nn.Linear(32, 32)), INT4, lora=qat.Lora(), learn="weight")


# -- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.guest("peft>=0.18")
@pytest.mark.parametrize("base", ["nf4/1x64*bf16", "nf4/1x64*int8/1x256", "int4/1x32*bf16", "int4/1x64*bf16+bf16"])
def test_qlora_with_peft(base):
    """QLoRA: PEFT's adapters learn over a quantized base; the gradient through the base is that of its values."""
    import peft

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 64)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    model = Model()
    lowp.quantize_(model, base)
    decoded = lowp.dequantize_(copy.deepcopy(model))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False)
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    wanted = peft.get_peft_model(decoded, copy.deepcopy(config))
    wanted.load_state_dict({k: v for k, v in tuned.state_dict().items() if "lora" in k}, strict=False)
    assert isinstance(tuned.base_model.model.up.base_layer.weight, QTensor)
    x = torch.randn(8, 128)
    for net in (tuned, wanted):
        net(x).square().mean().backward()
    grads = [{n: p.grad for n, p in net.named_parameters() if p.grad is not None} for net in (tuned, wanted)]
    assert grads[0].keys() == grads[1].keys() and all("lora" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=2e-2, atol=1e-4, msg=name)


@pytest.mark.guest("peft>=0.18")
def test_pefts_adapters_over_a_base_that_is_fake_quantized():
    """Adapters in floats beside a base that learns nothing but is seen as it will be served: what torchtune calls QAT + LoRA."""
    import peft

    model = nn.Sequential(nn.Linear(128, 64))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    qat.prepare(tuned, {"*.base_layer": INT4})
    x = torch.randn(4, 128)
    y = tuned(x)
    y.sum().backward()
    layer = tuned.base_model.model[0]
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0 and layer.base_layer.weight.grad is None
    qat.convert(tuned)
    assert isinstance(layer.base_layer.weight, QTensor)
    torch.testing.assert_close(tuned(x), y, rtol=1e-3, atol=1e-3)
