"""Exported graphs: observers where annotations ask for them, integers where observers were, close to the floats."""

import copy

import pytest
import torch
from lowp.torchao.quantization.pt2e import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    allow_exported_model_train_eval,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from lowp.torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from lowp.torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from lowp.torchao.quantization.utils import compute_error
from lowp.torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from torch import nn

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.5)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        x = self.first(x.mean((2, 3)))
        return self.second(self.drop(torch.relu(x) + x))


def exported(model, *inputs):
    return torch.export.export(model, inputs, strict=False).module()


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        return model.eval(), torch.randn(4, 3, 10, 10)


def operators(graph_module):
    return [
        str(node.target).partition(".default")[0] for node in graph_module.graph.nodes if node.op == "call_function"
    ]


QUANTIZERS = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    "xnnpack, channels": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)),
    "xnnpack, dynamic": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_dynamic=True)),
    "x86": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_network_in_integers_is_close_to_its_floats(net, name):
    model, x = net
    expected = model(x)
    prepared = prepare_pt2e(exported(model, x), QUANTIZERS[name]())
    torch.testing.assert_close(
        prepared(x), expected, atol=1e-5, rtol=1e-4
    )  # observing changes nothing, nor does folding
    converted = convert_pt2e(prepared)
    assert compute_error(expected, converted(x)) > 20
    codes = [b for b in converted.buffers() if b.dtype == torch.int8]
    assert len(codes) == (2 if "dynamic" in name else 3), "every weight that was annotated is integers"
    told = operators(converted)
    assert any("dequantize_per_channel" in op for op in told) == ("channels" in name or name == "x86")
    assert any("choose_qparams" in op for op in told) == ("dynamic" in name)
    assert not any(node.op == "call_module" and "post_process" in node.target for node in converted.graph.nodes)


def test_the_integers_are_those_of_torchs_observers(net):
    model, _ = net
    linear = model.second
    inputs = torch.randn(8, 16)
    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(exported(linear, inputs), XNNPACKQuantizer().set_global(config))
    prepared(inputs)
    converted = convert_pt2e(prepared)
    observer = PerChannelMinMaxObserver(
        dtype=torch.qint8, quant_min=-127, quant_max=127, qscheme=torch.per_channel_symmetric, eps=2**-12
    )
    observer(linear.weight)
    scale, _ = observer.calculate_qparams()
    codes = next(b for b in converted.buffers() if b.dtype == torch.int8)
    assert torch.equal(codes, (linear.weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8))


def test_equal_edges_and_shared_specs_have_one_observer(net):
    class Twice(nn.Module):
        def forward(self, x):
            return torch.cat([x, x + x], dim=1)

    x = torch.randn(2, 4)
    prepared = prepare_pt2e(exported(Twice(), x), QUANTIZERS["xnnpack"]())
    observers = {id(m) for m in prepared.modules() if isinstance(m, HistogramObserver)}
    prepared(x)
    converted = convert_pt2e(prepared)
    told = operators(converted)
    assert compute_error(Twice()(x), converted(x)) > 25
    assert len(observers) <= 2 and sum("quantized_decomposed.quantize" in op for op in told) <= 4
    for node in converted.graph.nodes:
        assert "dequantize" not in str(node.target) or len(node.users) == 1, "each consumer has a dequantize of its own"


class Annotates(Quantizer):
    """A quantizer of a test: what to write on the linear node."""

    def __init__(self, write):
        self.write = write

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target is aten.linear.default:
                node.meta["quantization_annotation"] = self.write(node)
        return model

    def validate(self, model):
        pass


ACT = QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=2**-12), -128, 127, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(torch.int8, MinMaxObserver.with_args(eps=2**-12), -127, 127, torch.per_tensor_symmetric)


def test_scales_that_are_given_and_that_follow_from_others():
    layer, x = nn.Linear(16, 8), torch.rand(4, 16)
    seen = []

    def bias_scale(observers):
        seen.extend(observers)
        scale = observers[0].calculate_qparams()[0] * observers[1].calculate_qparams()[0]
        return scale, torch.zeros(1, dtype=torch.int32)

    def write(node):
        act, weight, bias = node.args
        derived = DerivedQuantizationSpec(
            [(act, node), (weight, node)], bias_scale, torch.int32, -(2**31), 2**31 - 1, torch.per_tensor_symmetric
        )
        fixed = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
        return QuantizationAnnotation({act: fixed, weight: WEIGHT, bias: derived}, _annotated=True)

    prepared = prepare_pt2e(exported(layer, x), Annotates(write))
    prepared(x)
    converted = convert_pt2e(prepared)
    assert len(seen) == 2 and any(b.dtype == torch.int32 for b in converted.buffers())
    first = next(n for n in converted.graph.nodes if str(n.target).startswith("quantized_decomposed.quantize"))
    assert first.args[1:3] == (1 / 256, 0)
    assert compute_error(layer(x), converted(x)) > 30


def test_a_module_that_is_named_keeps_its_floats(net):
    model, x = net
    quantizer = QUANTIZERS["xnnpack, channels"]().set_module_name("second", None)
    prepared = prepare_pt2e(exported(model, x), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    assert sum(b.dtype == torch.int8 for b in converted.buffers()) == 2
    only = XNNPACKQuantizer().set_module_name("second", get_symmetric_quantization_config())
    prepared = prepare_pt2e(exported(model, x), ComposableQuantizer([only]))
    prepared(x)
    assert sum(b.dtype == torch.int8 for b in convert_pt2e(prepared).buffers()) == 1


def test_fake_quantizers_train_and_convert(net):
    model, x = net
    target = torch.randn(4, 4)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
    with pytest.warns(UserWarning, match="batch norms are folded"):
        prepared = prepare_qat_pt2e(exported(model, x), quantizer)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.02)
    losses = []
    for _ in range(8):
        loss = (prepared(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = prepared(x)
    assert compute_error(trained, convert_pt2e(prepared)(x)) > 25


def test_train_and_eval_of_an_exported_graph(net):
    model, x = net
    graph = exported(model, x)
    move_exported_model_to_train(graph)
    assert not torch.equal(graph(x), graph(x)), "dropout is on"
    move_exported_model_to_eval(graph)
    assert torch.equal(graph(x), graph(x))
    allow_exported_model_train_eval(graph)
    assert not torch.equal(graph.train()(x), graph(x))
    assert torch.equal(graph.eval()(x), graph(x))


def test_refusals():
    with pytest.raises(ValueError, match="wants an exported graph"):
        prepare_pt2e(nn.Linear(2, 2), XNNPACKQuantizer())
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    strange = Annotates(
        lambda node: QuantizationAnnotation({node.args[0]: SharedQuantizationSpec(node)}, _annotated=True)
    )
    with pytest.raises(ValueError, match="which no annotation quantizes"):
        prepare_pt2e(exported(layer, x), strange)
    prepared = prepare_pt2e(exported(layer, x), QUANTIZERS["xnnpack"]())
    prepared(x)
    with pytest.raises(ValueError, match="use_reference_representation"):
        convert_pt2e(copy.deepcopy(prepared), use_reference_representation=True)
