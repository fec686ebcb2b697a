"""Monitor: shares as counted by hand, the layer that is named when a loss goes NaN, and that watching changes no number."""

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn

from lowp.errors import TrainingError
from lowp.train import RECIPES, Monitor, convert


def build(recipe="float8_tensorwise"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    convert(model, recipe, keep_small=False)
    return model


def test_shares_by_hand():
    model = build()
    monitor = Monitor(model, every=2)
    x = torch.ones(4, 64)
    x[0, :16], x[1, :8] = 448.0, 0.0
    x[2, :4] = 2.0**-11  # below half of e4m3's smallest, 2**-9, for a scale of 1
    model(x).sum().backward()
    rows = {(row["layer"], row["operand"]): row for row in monitor.flush()}
    assert list(rows) == [("0", "x"), ("0", "w"), ("2", "x"), ("2", "w"), ("2", "g"), ("0", "g")]
    seen = rows["0", "x"]
    assert (
        seen["amax"] == 448
        and seen["underflow"] == pytest.approx(4 / 248)
        and seen["saturation"] == pytest.approx(16 / 256)
    )
    assert rows["0", "w"]["amax"] == pytest.approx(model[0].weight.abs().max().item())
    model(x).sum().backward()
    assert all(row["underflow"] is None and row["amax"] is not None for row in monitor.flush())
    model(x).sum().backward()
    assert all(row["saturation"] is not None for row in monitor.flush()), "every second step"


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_watching_changes_no_number(recipe):
    model, x = build(recipe), torch.randn(8, 64)
    watched = copy.deepcopy(model)
    monitor = Monitor(watched, every=1)
    for one in (model, watched):
        torch.manual_seed(0)
        one(x).square().sum().backward()
    assert torch.equal(model(x), watched(x))
    if not RECIPES[recipe].stochastic:
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), watched.parameters(), strict=True))
    monitor.flush()
    monitor.remove()
    watched(x)
    assert monitor.flush() == []


def test_a_lost_loss_names_its_layer(tmp_path):
    model, x = build(), torch.randn(8, 64)
    monitor = Monitor(model)
    loss = model(x).square().mean()
    loss.backward()
    monitor.check(loss)
    with torch.no_grad():
        model[2].weight[3, 4] = torch.nan
    loss = model(x).square().mean()
    with pytest.raises(
        TrainingError, match=r"step 1 is nan: first not finite was the weight of layer '2' \(amax nan, 0\.1"
    ):
        monitor.check(loss)
    with pytest.raises(TrainingError, match="every operand of the 0 watched layers was finite"):
        monitor.check(float("inf"))
    monitor.write(tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert len(rows) == 10 and rows[-1]["amax"] == "nan"


def test_a_long_run_keeps_its_looks_and_the_recent_steps():
    model = build()
    monitor = Monitor(model, every=5, recent=7)
    for _ in range(31):
        model(torch.ones(2, model[0].in_features)).sum().backward()
        monitor.flush()
    steps = sorted({row["step"] for row in monitor.history})
    assert steps == [0, 5, 10, 15, 20, *range(24, 31)]
    assert all((row["underflow"] is None) == bool(row["step"] % 5) for row in monitor.history)


def test_the_microbatch_that_is_lost_is_found():
    model, x = build(), torch.randn(8, 64)
    monitor = Monitor(model, every=1)
    for batch in (x, 3 * x, x * torch.nan, x):
        model(batch)
    with pytest.raises(TrainingError, match=r"first not finite was the input of layer '0' \(amax nan\)"):
        monitor.check(torch.nan)
    for batch in (x, 3 * x, x):
        model(batch)
    rows = {(row["layer"], row["operand"]): row for row in monitor.flush()}
    assert rows["0", "x"]["amax"] == pytest.approx(3 * x.abs().max().item()) and rows["0", "x"]["underflow"] is not None


def test_a_compiled_model_is_watched():
    model, x = build(), torch.randn(8, 64)
    monitor = Monitor(model, every=1)
    torch._dynamo.reset()
    seen = []
    for one in (model, torch.compile(model, backend="aot_eager")):
        one(x).sum().backward()
        seen.append({(row["layer"], row["operand"]): row["amax"] for row in monitor.flush()})
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_experts_are_not_watched_and_that_is_said():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 32, 32))

        def forward(self, x, offs):
            return torch._grouped_mm(x, self.w, offs=offs)

    model = nn.Sequential(nn.Linear(32, 32), Experts())
    convert(model, "mxfp8", keep_small=False)
    with pytest.warns(UserWarning, match=r"the products of 1 modules of experts \(1\) are not looked at"):
        Monitor(model)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs the package tensorboard")
def test_tensorboard(tmp_path):
    model = build()
    monitor = Monitor(model)
    model(torch.randn(2, 64)).sum().backward()
    monitor.flush()
    monitor.to_tensorboard(tmp_path)
    assert list(tmp_path.iterdir())
