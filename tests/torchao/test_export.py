"""Quantized weights in exported graphs: torchao's operators on plain tensors, which is what backends look for."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from lowp.torchao import graph
from lowp.torchao.apply import quantize_
from lowp.torchao.config import CONFIGS
from lowp.torchao.predicates import unwrap_tensor_subclass

SCRIPT = """
import itertools, sys, torch
from torch import nn
import lowp.torchao; lowp.torchao.install()
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.utils import unwrap_tensor_subclass

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(32, 64), nn.Linear(64, 48)
    def forward(self, ids):
        return self.layer(self.table(ids))

ids = torch.randint(0, 32, (2, 5))
configs = (Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig)
widths = (2, torch.float32, False), (3, torch.bfloat16, False), (4, torch.float32, True), (8, torch.bfloat16, False)
for config, (bits, dtype, strict), granularity in itertools.product(configs, widths, (PerGroup(32), PerAxis(0))):
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    name = "weight_granularity" if config is configs[0] else "granularity"
    quantize_(model, config(weight_dtype=getattr(torch, f"int{bits}"), **{name: granularity}))
    if config is not configs[0]:
        quantize_(model, config(granularity=granularity), lambda m, n: isinstance(m, nn.Embedding))
    expected = model(ids)
    unwrap_tensor_subclass(model)
    exported = torch.export.export(model, (ids,), strict=strict).run_decompositions({})
    ops = [str(n.target).removesuffix(".default") for n in exported.graph.nodes if n.op == "call_function"]
    assert not [op for op in ops if op.startswith("lowp")], ops
    weights = 1 + (config is not configs[0])
    activations = 2 - weights
    counts = [ops.count(f"torchao.{name}_affine") for name in ("choose_qparams", "quantize", "dequantize")]
    assert counts == [activations, activations, weights + activations], (counts, ops)
    plain = [t for t in exported.state_dict.values() if t.dtype is torch.int8 and t.shape[-1] == 64]
    assert len(plain) == weights and all(t.int().abs().max() <= 2 ** (bits - 1) for t in plain if t.shape[0] == 48)
    got = exported.module()(ids)
    assert got.dtype is dtype
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if dtype is torch.float32 else 2e-2), (config, bits, granularity, dtype, error)
print("same")
"""


def test_a_weight_is_exported_by_torchaos_operators():
    """Widths, granularities, dtypes, both ways of tracing, linear layers and embeddings; the numbers of the model."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["same"], done.stderr[-3000:]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_exported_after_unwrapping(name):
    """The numbers of the model; for one of them in what torch.compile runs, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128)).bfloat16()
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    fields = {"act_quant_scale": torch.tensor(0.03)} if name == "Int8StaticActivationInt8WeightConfig" else {}
    quantize_(model, CONFIGS[name](**fields))
    with torch.no_grad():
        expected = model(x)
        unwrap_tensor_subclass(model)
        assert torch.equal(model(x), expected)
        exported = torch.export.export(model, (x,))
        assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in exported.state_dict.values())
        assert torch.equal(exported.module()(x), expected)
        if name == "Int8WeightOnlyConfig":
            assert torch.equal(torch.compile(model, backend="eager")(x), expected)


@pytest.mark.parametrize(
    ("dims", "transposed", "padding"), list(itertools.product((1, 2, 3), (False, True), ("same", 1)))
)
def test_convolutions_are_known_in_a_graph(dims, transposed, padding):
    if transposed and padding == "same":
        padding = 0
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    norm = getattr(nn, f"BatchNorm{dims}d")(4)
    model = nn.Sequential(kind(3, 4, 3, padding=padding), norm, nn.ReLU()).eval()
    exported = torch.export.export(model, (torch.randn(2, 3, *[6] * dims),))
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert sum(map(graph.is_conv_node, calls)) == (not transposed)
    assert sum(map(graph.is_conv_transpose_node, calls)) == transposed
    assert sum(map(graph.is_conv_or_conv_transpose_node, calls)) == 1
    assert sum(map(graph.is_bn_node, calls)) == 1
    assert not any(map(graph.is_conv_or_conv_transpose_node, set(exported.graph.nodes) - set(calls)))


def test_users_that_ask_for_a_size_are_left_out():
    class Model(nn.Module):
        def forward(self, x):
            y = x * 2
            return y.relu() + y.shape[0]

    dynamic = ({0: torch.export.Dim("rows", min=2, max=64)},)
    exported = torch.export.export(Model(), (torch.randn(4, 3),), dynamic_shapes=dynamic)
    asked = [node for node in exported.graph.nodes if any(map(graph.is_sym_size_node, node.users))]
    assert asked
    for node in asked:
        kept = graph.filter_sym_size_users(node)
        assert len(kept) < len(node.users) and not any(map(graph.is_sym_size_node, kept))
