"""The linear layer in low precision: every recipe against float64, against its own definition, and against itself compiled."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from lowp.errors import MisfitError, SpellingError
from lowp.numerics import Scheme, fake_quantize
from lowp.numerics.compare import relative_error
from lowp.tensor import QTensor
from lowp.train import RECIPES, Linear, Recipe, cached_weights, convert, gather_codes, linear
from lowp.train.linear import weight_codes
from lowp.train.recipes import recipe_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = list(RECIPES)

# ||error|| / ||float64|| of output, grad_input and grad_weight on normal numbers, a tenth above what was measured.
# An e4m3 operand errs by 2.6 %, an e5m2 by 5.2 %, an e2m1 in blocks of 32 by 11.6 %; two operands' errors add as squares.
TOLERANCE = {
    "float8_tensorwise": (0.042, 0.066, 0.066),
    "float8_rowwise": (0.042, 0.042, 0.042),
    "float8_rowwise_gw_hp": (0.042, 0.042, 0.004),
    "float8_blockwise": (0.042, 0.042, 0.042),
    "mxfp8": (0.042, 0.042, 0.042),
    "mxfp4": (0.182, 0.004, 0.004),
    "nvfp4": (0.149, 0.004, 0.004),
    "int8": (0.011, 0.015, 0.013),
    "bitnet": (0.57, 0.57, 0.004),
}


def case(dtype=torch.bfloat16, device="cpu", tokens=100, rows=384, columns=256):
    x = torch.randn(tokens, columns, device=device, dtype=dtype, requires_grad=True)
    w = nn.Parameter(torch.randn(rows, columns, device=device, dtype=dtype) * 0.05)
    return x, w, torch.randn(tokens, rows, device=device, dtype=dtype)


def run(function, x, w, g):
    """Output and both gradients."""
    x, w = x.detach().clone().requires_grad_(), nn.Parameter(w.detach().clone())
    torch.manual_seed(1)
    y = function(x, w)
    y.backward(g)
    return y.detach(), x.grad, w.grad


def test_every_recipe_has_a_tolerance():
    assert set(TOLERANCE) == set(RECIPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients_against_float64(name, dtype, device):
    x, w, g = case(dtype, device)
    found = run(lambda x, w: linear(x, w, None, name), x, w, g)
    exact = run(lambda x, w: x @ w.t(), x.double(), w.double(), g.double())
    assert [t.dtype for t in found] == [dtype] * 3
    errors = [relative_error(e, f) for f, e in zip(found, exact, strict=True)]
    assert all(error <= most for error, most in zip(errors, TOLERANCE[name], strict=True)), errors


@pytest.mark.parametrize("name", [name for name in NAMES if not RECIPES[name].stochastic])
def test_it_is_the_product_of_what_its_formats_hold(name, device):
    """Each operand quantized and dequantized along the axis that is summed, multiplied in float64."""
    x, w, g = case(torch.float32, device, tokens=128)
    recipe = RECIPES[name]

    def product(scheme, a, b):
        parsed = Scheme.parse(scheme) if scheme else None
        held = [
            t if fmt is None else fake_quantize(t.contiguous(), fmt)
            for t, fmt in ((a, parsed and parsed.act), (b, parsed and parsed.weight))
        ]
        return held[0].double() @ held[1].double().t()

    y, dx, dw = run(lambda x, w: linear(x, w, None, name), x, w, g)
    x, w = x.detach(), w.detach()
    limit = 1e-5 if device.type == "cpu" else 5e-3  # tensor cores sum float8 in fewer bits
    assert relative_error(product(recipe.output, x, w), y) < limit
    assert relative_error(product(recipe.grad_input, g, w.t()), dx) < limit
    assert relative_error(product(recipe.grad_weight, g.t(), x.t()), dw) < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_huge_numbers_stay_finite(name, dtype, device):
    x, w, g = case(dtype, device, tokens=33)
    big = 3e4 if dtype == torch.float16 else 1e30
    for x_of, w_of, g_of in (
        (lambda t: t * 0, lambda t: t, lambda t: t),
        (lambda t: t, lambda t: t * 0, lambda t: t * 0),
        (lambda t: (t * big / 8).clamp(-big, big), lambda t: t * 1e-4, lambda t: t * 1e-5),
        (lambda t: t * 1e-6, lambda t: t, lambda t: t * 1e-7),
    ):
        found = run(lambda x, w: linear(x, w, None, name), x_of(x), w_of(w), g_of(g))
        exact = run(lambda x, w: x @ w.t(), x_of(x).double(), w_of(w).double(), g_of(g).double())
        fits = [e.abs().max() < torch.finfo(dtype).max / 2 for e in exact]
        assert all(bool(f.isfinite().all()) for f, fit in zip(found, fits, strict=True) if fit)
        assert all(bool((f == 0).all()) for f, e in zip(found, exact, strict=True) if not e.any())


def test_a_nan_is_not_hidden(device):
    x, w, g = case(torch.bfloat16, device)
    broken = x.detach().clone()
    broken[3, 5] = torch.nan
    for name in NAMES:
        if not name.startswith(("int8", "bitnet")):  # integers hold no NaN: their scale does
            y, _, dw = run(lambda x, w, name=name: linear(x, w, None, name), broken, w, g)
            assert y[3].isnan().all() and dw.isnan().any(), name


@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_gives_the_same_numbers_in_one_graph(name, device):
    x, w, g = case(torch.bfloat16, device, tokens=48)
    torch._dynamo.reset()

    def function(x, w):
        return linear(x.view(2, -1, x.shape[-1]), w, None, name).flatten(0, 1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(function, x, w, g), run(compiled, x, w, g), strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("name", [name for name in NAMES if RECIPES[name].operands.w_column])
def test_compiled_with_gathered_codes_it_is_one_graph(name, device):
    x, w, g = case(torch.bfloat16, device, tokens=48)
    codes = QTensor.quantize(w, RECIPES[name].operands.w_row)
    torch._dynamo.reset()

    def function(x, w):
        return linear(x, codes, None, name)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(run(function, x, w, g)[:2], run(compiled, x, w, g)[:2], strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_tokens(name, tokens, device):
    x, w, g = case(torch.bfloat16, device, tokens=tokens)
    y, dx, dw = run(lambda x, w: linear(x, w, None, name), x, w, g)
    assert y.shape == (tokens, 384) and dx.shape == x.shape and dw.shape == w.shape
    exact = g.detach().double().t() @ x.detach().double()
    assert relative_error(exact, dw) <= TOLERANCE[name][2] * 1.5 if tokens else not dw.any()


def test_gradients_rounded_at_random_are_unbiased(device):
    """The mean over draws comes nearer to the float's gradient than any one of them; without chance it would not."""
    x, w, g = case(torch.float32, device)
    exact = g.double() @ w.detach().double()
    draws = []
    for seed in range(24):
        torch.manual_seed(seed)
        x1 = x.detach().clone().requires_grad_()
        linear(x1, w, None, "int8").backward(g)
        draws.append(x1.grad)
    one, mean = relative_error(exact, draws[0]), relative_error(exact, torch.stack(draws).mean(0))
    assert not torch.equal(draws[0], draws[1])
    assert mean < 0.75 * one  # what is left is the weight's rounding, which is the same each time


@pytest.mark.parametrize("name", NAMES)
def test_cached_weights_and_checkpointing_change_no_number(name, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 256, bias=False)).to(device, torch.bfloat16)
    convert(model, name, keep_small=False)
    batches = torch.randn(2, 40, 256, device=device, dtype=torch.bfloat16)

    def gradients(forward):
        model.zero_grad()
        torch.manual_seed(3)
        for batch in batches:  # two microbatches
            forward(batch).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model)
    assert all(map(torch.equal, plain, gradients(lambda x: checkpoint(model, x, use_reentrant=False))))
    with cached_weights(model):
        kept = gradients(model)
        assert len(model[0].codes) >= 2 or name in ("mxfp4", "nvfp4")
    assert all(map(torch.equal, plain, kept)) and model[0].codes == ()


def test_layers_that_read_one_tensor_share_its_cast(device, monkeypatch):
    module = sys.modules["lowp.train.linear"]
    casts = []
    real = module.cast_both
    monkeypatch.setattr(module, "cast_both", lambda x, *rest, **more: casts.append(x.shape) or real(x, *rest, **more))
    x, w, g = case(device=device)
    other = (w.detach() * 2).requires_grad_()

    def outputs(h):
        casts.clear()
        return [linear(h, one, None, "float8_tensorwise") for one in (w, other)]

    h = x * 1
    found = outputs(h)
    assert casts.count(h.shape) == 1
    alone = [linear(x * 1, one, None, "float8_tensorwise") for one in (w, other)]
    for a, b in zip(found, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(*(torch.autograd.grad(y, x, g, retain_graph=True)[0] for y in (a, b)))
    h = x * 1
    first = linear(h, w, None, "float8_tensorwise")
    h.mul_(2)  # another number now
    assert torch.equal(linear(h, w, None, "float8_tensorwise"), first * 2)
    h.data = x.detach() * 3  # no version counts this
    assert torch.equal(linear(h, w, None, "float8_tensorwise"), linear(x * 3, w, None, "float8_tensorwise"))
    linear(h, w, None, "float8_tensorwise")
    assert module._LAST.held[0]() is h
    del h, found, first
    assert module._LAST.held is None  # nothing is held for a tensor that is gone
    outputs(x.detach())
    assert casts.count(x.shape) == 2  # what a user fills between steps is never taken for the same


@pytest.mark.gpu
def test_another_stream_casts_for_itself():
    """It waited for x, not for codes that a sibling's stream is still writing."""
    module, (x, w, _) = sys.modules["lowp.train.linear"], case(device="cuda")
    h = x * 1
    linear(h, w, None, "float8_tensorwise")
    codes = module._LAST.held[2]
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        linear(h, w, None, "float8_tensorwise")
    assert module._LAST.held[2][0] is not codes[0]
    torch.cuda.synchronize()


@pytest.mark.parametrize("alone", [True, False])
def test_compiled_graphs_share_casts_and_keep_codes_where_one_process_trains(alone, monkeypatch):
    """Two layers read one x: one cast of x; the weights' both forms in forward, or by row and, for FSDP, again in backward."""
    monkeypatch.setattr(sys.modules["lowp.train.linear"], "_alone", lambda: alone)
    counts = {}

    def counted(name):
        def compiler(graph, _):
            counts[name] = sum("cast_both" in str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=counted("forward"),
        bw_compiler=counted("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    x, w, g = case(tokens=48)
    torch._dynamo.reset()

    def function(x, w):
        return linear(x, w, None, "float8_tensorwise") + linear(x, w * 2, None, "float8_tensorwise")

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for eager, traced in zip(run(function, x, w, g), run(compiled, x, w, g), strict=True):
        assert torch.equal(eager, traced)
    assert counts == {"forward": 3, "backward": 1 if alone else 3}  # both layers have one gradient, too


def test_a_weight_that_changes_inside_of_the_cache_is_said():
    model = nn.Sequential(Linear(32, 32))
    with pytest.raises(MisfitError, match="0 changed: step the optimizer after the block"), cached_weights(model):
        model[0].weight.data.add_(1)
        with torch.no_grad():
            model[0].weight.add_(1)
    with pytest.raises(MisfitError, match="0 changed: step the optimizer after the block"), cached_weights(model):
        model[0].weight.data = torch.zeros(32, 32)


def test_what_is_copied_inside_of_the_cache_reads_its_own_weights(tmp_path):
    model, x = nn.Sequential(Linear(32, 32, bias=False)), torch.randn(4, 32)
    with cached_weights(model):
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        assert model[0].codes
    for other in (copied, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(x), model(x))
        other[0].weight.data.zero_()
        assert not other(x).any()


def test_weights_that_cannot_be_cached_are_said():
    model = nn.Sequential(Linear(32, 32), Linear(32, 32))
    gather_codes(nn.Sequential(model[1]))
    with pytest.warns(UserWarning, match="wants plain weights, 1 are sharded or split .1.:"), cached_weights(model):
        assert model[0].codes and not model[1].codes


@pytest.mark.parametrize("name", NAMES)
def test_autocast_and_master_weights_in_float32(name, device):
    """Backward too, which some call inside: the products of the reference are not autocast."""
    x, _, g = case(torch.float32, device)
    layer = nn.Linear(256, 384, device=device)
    convert(layer, name, keep_small=False)
    torch.manual_seed(1)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
        y.backward(g.bfloat16())
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    found = [y.detach(), x.grad, layer.weight.grad]
    direct = run(lambda x, w: linear(x, w, layer.bias, name), x.detach().bfloat16(), layer.weight, g.bfloat16())
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(direct, found, strict=True))


def test_gradients_of_gradients_are_refused(device):
    x, w, _ = case(torch.bfloat16, device)
    loss = linear(x, w, None, "mxfp4").square().sum()
    (dw,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dw.square().sum().backward()


def test_many_tokens_do_not_overflow(device):
    """127 x 127 x 140,000 is beyond an int32."""
    x, w = torch.ones(140_000, 16, device=device), nn.Parameter(torch.ones(16, 16, device=device))
    linear(x, w, None, "int8").backward(torch.ones(140_000, 16, device=device))
    assert relative_error(torch.full((16, 16), 140_000.0, device=device), w.grad) < 1e-5


@pytest.mark.parametrize("scheme", ["int8/row", "e4m3/row", "int8/1x128", "int4/1x32", "nf4"])
def test_a_quantized_weight_that_is_not_the_recipes_is_refused(scheme, device):
    weight = QTensor.quantize(torch.randn(64, 256, device=device), scheme)
    with pytest.raises(MisfitError, match=r"wants a weight in floats or in e4m3/row\*e8m0, .* before lowp.quantize_"):
        linear(torch.ones(2, 256, device=device), weight, None, "float8_rowwise")


def test_frozen_operands_get_no_gradient(device):
    x, w, g = case(torch.bfloat16, device)
    frozen = w.detach()
    y = linear(x, frozen, None, "float8_rowwise")
    y.backward(g)
    assert x.grad is not None
    y = linear(x.detach(), w, None, "float8_rowwise")
    y.backward(g)
    assert w.grad is not None


def test_scales_of_powers_of_two():
    recipe = RECIPES["float8_tensorwise"].power_of_two()
    assert recipe.output == "e4m3/tensor*e8m0@e4m3/tensor*e8m0"
    x, w, g = case(torch.float32)
    found = run(lambda x, w: linear(x, w, None, recipe), x, w, g)
    exact = run(lambda x, w: x @ w.t(), x.double(), w.double(), g.double())
    assert all(relative_error(e, f) < 0.07 for f, e in zip(found, exact, strict=True))
    layer = nn.Linear(256, 384)
    convert(layer, "float8_rowwise_gw_hp", power_of_two=True, keep_small=False)
    scales = [t.float() for t in weight_codes(layer.weight, layer.recipe) if t.dtype == torch.float8_e8m0fnu]
    assert len(scales) == 2 and all((torch.frexp(scale).mantissa == 0.5).all() for scale in scales)


def test_a_recipe_of_your_own(device):
    mine = Recipe(name="mine", output="int8/row@e4m3/row", grad_input="", grad_weight="int8/row")
    x, w, g = case(torch.bfloat16, device)
    found = run(lambda x, w: linear(x, w, None, mine), x, w, g)
    exact = run(lambda x, w: x @ w.t(), x.double(), w.double(), g.double())
    assert all(relative_error(e, f) < 0.04 for f, e in zip(found, exact, strict=True))


def test_errors_say_what_to_do():
    with pytest.raises(SpellingError, match="did you mean 'float8_rowwise'"):
        recipe_of("float8_rowise")
    with pytest.raises(MisfitError, match=r"wants x of \(\.\.\., 32\)"):
        linear(torch.ones(2, 16), torch.ones(16, 32))
    with pytest.raises(MisfitError, match="multiples"):
        linear(torch.ones(2, 40), torch.ones(16, 40), None, "mxfp8")


def test_a_copy_and_a_pickle_of_the_module_keep_the_recipe(tmp_path):
    layer = Linear(32, 16)
    convert(layer, "int8", keep_small=False)
    assert copy.deepcopy(layer).recipe == RECIPES["int8"] and "recipe=int8" in repr(layer)
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.load(tmp_path / "layer.pt", weights_only=False).recipe == RECIPES["int8"]
