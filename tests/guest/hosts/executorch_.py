"""ExecuTorch: a model in 8da4w, and one in int8 by its own quantizer of exported graphs, through torch.export and the XNNPACK
partitioner to a program that its runtime runs."""

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.quant_api import Int8DynamicActivationInt4WeightConfig
from torchao.utils import unwrap_tensor_subclass

CASES = {
    "int4 by groups of 32": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
    "int4 by rows": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerAxis(0)),
    "int8 by rows": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
    "the old name": Int8DynamicActivationInt4WeightConfig(group_size=32),
}


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False)).eval()


def lowered(model, example, strict=True):
    program = torch.export.export(model, example, strict=strict)
    return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])


def run(program, x):
    loaded = Runtime.get().load_program(program.to_executorch().buffer)  # a method does not keep its program alive
    method = loaded.load_method("forward")
    return method.execute([x])[0].clone()


x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
size_of_floats = len(lowered(toy(), (x,)).to_executorch().buffer)
for name, config in CASES.items():
    model = toy()
    floats = model(x)
    quantize_(model, config)
    quantized = model(x)
    unwrap_tensor_subclass(model)
    assert (model(x) - quantized).norm() / quantized.norm() < 1e-2, name
    program = lowered(model, (x,))
    left = {str(node.target) for node in program.exported_program().graph.nodes if node.op == "call_function"}
    assert not [op for op in left if "linear" in op or "mm" in op or "affine" in op], (name, left)
    assert any("executorch_call_delegate" in op for op in left), (name, left)
    got = run(program, x)
    error = ((got - quantized).norm() / quantized.norm()).item()
    far = ((floats - quantized).norm() / quantized.norm()).item()
    assert error < 0.02 and error < far, (name, error, far)
    size = len(program.to_executorch().buffer)
    assert size < (0.45 if "int4" in name or "old" in name else 0.6) * size_of_floats, (name, size, size_of_floats)
    print("ok", name, f"error {error:.5f}, to floats {far:.5f}, {size} of {size_of_floats} bytes", flush=True)

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
).eval()
image = torch.randn(2, 3, 16, 16)
quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
prepared = prepare_pt2e(torch.export.export(net, (image,)).module(), quantizer)
prepared(image)
converted = convert_pt2e(prepared)
quantized = converted(image)
assert (quantized - net(image)).norm() / net(image).norm() < 0.05
program = lowered(converted, (image,))
left = {str(node.target) for node in program.exported_program().graph.nodes if node.op == "call_function"}
assert not [op for op in left if "convolution" in op or "linear" in op], left
error = (run(program, image) - quantized).abs().max().item()
assert error < 0.02, error
print("ok", f"XNNPACK's quantizer of exported graphs, {error:.5f}", flush=True)
