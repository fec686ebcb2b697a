"""What a compiler makes of prepared layers: activations are its own business and shared, and nothing more is kept than before."""

import collections

import pytest
import torch
from torch import nn

from lowp import qat

TOKENS, WIDE = 64, 128


class Block(nn.Module):
    """Two layers that read one normed input, as attention and gated products do, and one that reads what comes of both."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDE)
        self.gate, self.up = (nn.Linear(WIDE, 2 * WIDE, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDE, WIDE, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def counted(model, x):
    """Calls of our operators in the graphs of forward and backward, the bytes kept between them, the answer and the gradients."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    calls = []

    def look(graph, inputs):
        calls.append(collections.Counter(str(n.target) for n in graph.graph.nodes if str(n.target).startswith("lowp")))
        return graph

    backend = aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    run = torch.compile(model, backend=backend, fullgraph=True)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = run(x)
    y.square().sum().backward()
    torch._dynamo.reset()
    return calls, sum(kept.values()), [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [None, qat.Lora(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("scheme", ["int4/1x32*bf16", "int4/1x32*bf16@int8/row", "e4m3/row@e4m3/row"])
def test_a_compiled_step_keeps_what_floats_keep_and_casts_activations_inside_the_graph(model, scheme, lora):
    x = torch.randn(TOKENS, WIDE)
    _, floats, _ = counted(model, x)
    qat.prepare(model, scheme, lora=lora)
    if lora is not None:
        for module in (model.gate, model.up, model.down):
            nn.init.normal_(module.fake_weight.lora_b, std=0.02)
    model.zero_grad()
    (forward, backward), kept, compiled = counted(model, x)
    assert sum(forward.values()) == sum(backward.values()) == 3, "one for each weight, and again in the backward"
    scales = 3 * TOKENS * 8  # of tokens, and what adapters of rank 4 see of them
    assert kept <= floats + scales, (kept, floats)
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.square().sum().backward()
    eager = [y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def test_a_merged_weight_is_one_operator_of_the_same_numbers():
    from lowp.numerics import Format, dequantize, quantize
    from lowp.ops.fake_quantize import fake_quantize_merged, merged

    fmt = Format.parse("int4/1x32*bf16")
    base, b, a = torch.randn(64, 128).bfloat16(), torch.randn(64, 4), torch.randn(4, 128)
    wanted = dequantize(quantize(torch.addmm(base.float(), b, a, alpha=0.5), fmt), fmt)
    for again in (False, True):
        assert torch.equal(fake_quantize_merged(base, b, a, 0.5, fmt, again=again), wanted)
    assert torch.equal(merged(base, b, a, 0.5), torch.addmm(base.float(), b, a, alpha=0.5))
    for name in ("fake_quantize_merged", "fake_quantize_merged_again"):
        torch.library.opcheck(
            getattr(torch.ops.lowp, name), (base, b, a, 0.5, str(fmt)), test_utils=("test_schema", "test_faketensor")
        )
