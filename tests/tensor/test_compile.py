"""QTensor under torch.compile, torch.export and autograd: no graph break, no recompile for each batch, the same numbers."""

import copy
import math
import zipfile

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lowp

SCHEMES = (
    "int8",
    "int4",
    "int4_asym",
    "int3",
    "int8/row@int8/row",
    "fp8",
    "fp8-dynamic",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "nf4",
    "int4-dynamic",
)


@pytest.fixture(params=SCHEMES)
def model(request, device):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128, bias=False)).to(device, torch.bfloat16)
    lowp.quantize_(model, request.param)
    return model


def batch(model, size):
    return torch.randn(size, 256, device=model[0].weight.device, dtype=torch.bfloat16)


def test_full_graph_and_no_recompile_for_each_batch(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in (5, 7, 33, 64, 100):
        x = batch(model, size)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count <= 2  # one, and one more where a kernel treats few tokens differently


def test_gradient_to_the_input_under_compile(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = batch(model, 6).requires_grad_()
    y = batch(model, 6)
    y.copy_(x.detach()).requires_grad_()
    compiled(x).float().square().sum().backward()
    model(y).float().square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.grad)


def test_export(model):
    example = (batch(model, 4),)
    program = torch.export.export(
        copy.deepcopy(model), example, dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=512)},)
    )
    x = batch(model, 9)
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16@int8/row+int8", "nf4"])
def test_a_compiled_package_without_python(scheme, tmp_path):
    """AOTInductor: the model as a shared library, whose calls of the CPU's operators go by torch's dispatcher."""
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128, bias=False)).to(torch.bfloat16)
    lowp.quantize_(model, scheme)
    with torch.no_grad():
        tokens = torch.export.Dim("tokens", min=2, max=512)
        program = torch.export.export(model, (batch(model, 4),), dynamic_shapes=({0: tokens},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for size in (2, 9, 100):
            x = batch(model, size)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-2, atol=1e-2)
    if model[0].weight.spec.layout == "planes":
        with zipfile.ZipFile(package) as files:
            assert any(b"planes_linear" in files.read(name) for name in files.namelist())


@pytest.mark.parametrize("scheme", ["int8", "int4", "int8/row@int8/row", "nvfp4", "fp8-dynamic"])
def test_inductor(scheme, device):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU()).to(device, torch.bfloat16)
    lowp.quantize_(model, scheme)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(8, 256, device=device, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)


def test_weights_stay_in_few_bits_under_compile():
    """Nothing folds the weight back into floats: the traced graph holds the packed bytes and no float copy of the weight."""
    torch._dynamo.reset()
    model = nn.Linear(256, 256, bias=False)
    lowp.quantize_(model, "nf4")
    graphs = []

    def record(graph, inputs):
        graphs.append([tuple(i.shape) + (i.dtype,) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=record))(torch.randn(3, 256))
    packed = [(*tensor.shape, tensor.dtype) for tensor in model.weight.packed.values()]
    assert all(shape in graphs[0] for shape in packed)
    assert not any(math.prod(shape[:-1]) >= 256 * 256 for shape in graphs[0])


def test_graphs_kept_on_disk_do_not_outlive_the_code_that_chose_their_kernels(tmp_path, monkeypatch):
    from lowp.tensor import qtensor

    kernel = tmp_path / "kernels" / "library.so"
    kernel.parent.mkdir()
    monkeypatch.setattr(qtensor, "__file__", str(tmp_path / "tensor" / "qtensor.py"))
    seen = [qtensor._installed.__wrapped__()]
    for content in (b"one", b"another"):
        kernel.write_bytes(content)
        seen.append(qtensor._installed.__wrapped__())
    assert len(set(seen)) == 3
    kept = qtensor.QTensor.quantize(torch.randn(8, 64), "int8/row")._stable_hash_for_caching()
    assert qtensor._installed() in kept
