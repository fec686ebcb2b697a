"""Experts in low precision: ragged groups, forward and both gradients, against floats and against the same thing compiled."""

import copy

import pytest
import torch
from torch import nn

from lowp.errors import MisfitError
from lowp.numerics import Format, fake_quantize
from lowp.numerics.compare import relative_error
from lowp.train import RECIPES, convert, grouped_linear, revert

NAMES = [name for name, recipe in RECIPES.items() if not recipe.not_for_experts]
GROUPS = {"ragged": [5, 0, 35, 17], "one": [0, 0, 0, 57], "even": [16, 16, 16, 16], "none": [0, 0, 0, 0]}


class Experts(nn.Module):
    """As torchtitan and transformers have them: parameters (E, K, N), multiplied sorted by expert."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 64, 96) * 0.1), nn.Parameter(torch.randn(4, 96, 64) * 0.1)

    def forward(self, x, offs):
        h = torch._grouped_mm(x.bfloat16(), self.up.bfloat16(), offs=offs)
        return torch._grouped_mm(nn.functional.silu(h), self.down.bfloat16(), offs=offs)


class Half(Experts):
    """One of its products goes another way."""

    def forward(self, x, offs):
        h = torch._grouped_mm(x.bfloat16(), self.up.bfloat16(), offs=offs)
        return h.expand(4, -1, -1) @ self.down.bfloat16()


def offsets(sizes, device):
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


def test_which_recipes_are_for_experts():
    assert NAMES == ["float8_rowwise", "mxfp8"]
    with pytest.raises(MisfitError, match="float8_tensorwise is not for experts"):
        grouped_linear(torch.ones(4, 32), torch.ones(2, 16, 32), offsets([2, 2], "cpu"), "float8_tensorwise")
    with pytest.raises(MisfitError, match=r"wants \(T, K\), \(E, N, K\) and \(E,\)"):
        grouped_linear(torch.ones(4, 32), torch.ones(2, 16, 32), offsets([2, 1, 1], "cpu"))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_each_experts_product_of_what_the_formats_hold(name, groups, device):
    offs = offsets(GROUPS[groups], device)
    tokens = max(int(offs[-1]), 8)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.randn(tokens, 64, device=device, dtype=dtype, requires_grad=True)
    w = nn.Parameter(torch.randn(4, 96, 64, device=device, dtype=dtype) * 0.1)
    g = torch.randn(tokens, 96, device=device, dtype=dtype)
    y = grouped_linear(x, w, offs, name)
    y.backward(g)
    fmt = Format.parse(RECIPES[name].output.split("@")[0])

    def held(t):
        fill = -t.shape[-1] % 32  # groups are filled up with zeros
        return fake_quantize(nn.functional.pad(t, (0, fill)).contiguous(), fmt)[..., : t.shape[-1]].double()

    limit = 1e-5 if device.type == "cpu" else 5e-3
    for e, (start, end) in enumerate(zip([0, *offs.tolist()[:-1]], offs.tolist(), strict=True)):
        x_e, g_e, w_e = x.detach()[start:end], g[start:end], w.detach()[e]
        if start < end:
            assert relative_error(held(x_e) @ held(w_e).t(), y[start:end]) < limit
            assert relative_error(held(g_e) @ held(w_e.t()).t(), x.grad[start:end]) < limit
            assert relative_error(held(g_e.t()) @ held(x_e.t()).t(), w.grad[e]) < limit
        else:
            assert not w.grad[e].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_experts_is_recognised(name, device):
    model = Experts().to(device)
    floats = copy.deepcopy(model)
    report = convert(model, name, keep_small=False)
    assert [(row.fqn, row.recipe) for row in report.rows] == [("up", name), ("down", name)]
    x, offs = torch.randn(57, 64, device=device), offsets(GROUPS["ragged"], device)
    g = torch.randn(57, 64, device=device, dtype=torch.bfloat16)
    (y := model(x, offs)).backward(g)
    (expected := floats(x, offs)).backward(g)
    assert 0.01 < relative_error(expected.double(), y) < 0.08
    for mine, theirs in zip(model.parameters(), floats.parameters(), strict=True):
        assert type(mine) is nn.Parameter and mine.grad.dtype == torch.float32
        assert 0.01 < relative_error(theirs.grad.double(), mine.grad) < 0.08
    torch._dynamo.reset()
    again = copy.deepcopy(model)
    again.zero_grad()
    (traced := torch.compile(again, fullgraph=True, backend="aot_eager")(x, offs)).backward(g)
    assert torch.equal(traced, y)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert type(revert(model)) is Experts and torch.equal(model(x, offs), expected)


def test_experts_that_are_not_multiplied_so_are_said():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 32, 32))

        def forward(self, x):
            return x @ self.w[0]

    model = Loop()
    convert(model, "mxfp8", keep_small=False)
    with pytest.warns(UserWarning, match=r"multiplied 0 of its 1 stacks of experts by torch\._grouped_mm"):
        model(torch.randn(4, 32))
    half = Half()
    convert(half, "mxfp8", keep_small=False)
    with pytest.warns(UserWarning, match="multiplied 1 of its 2 stacks of experts"):
        half(torch.randn(57, 64), offsets(GROUPS["ragged"], "cpu"))
    report = convert(nn.ParameterDict({"w": nn.Parameter(torch.randn(2, 32, 32))}), "mxfp8", keep_small=False)
    assert "has no forward of its own" in report.rows[0].why


def test_a_pickle_and_a_copy_of_converted_experts(tmp_path):
    model = nn.Sequential(Experts())
    convert(model, "mxfp8", keep_small=False)
    torch.save(model, tmp_path / "model.pt")
    x, offs = torch.randn(57, 64), offsets(GROUPS["ragged"], "cpu")
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert type(other[0]) is type(model[0]) and other[0].lowp_recipe == RECIPES["mxfp8"]
        assert torch.equal(other[0](x, offs), model[0](x, offs)) and type(revert(other)[0]) is Experts


@pytest.mark.parametrize("name", NAMES)
def test_autocast_rounds_no_operand(name, device):
    x, w = torch.randn(57, 64, device=device), torch.randn(4, 96, 64, device=device) * 0.1
    found = []
    for on in (False, True):
        x1, w1 = x.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=on):
            y = grouped_linear(x1, w1, offsets(GROUPS["ragged"], device), name)
            y.square().sum().backward()
        found.append((y.detach(), x1.grad, w1.grad))
    assert all(map(torch.equal, *found))
