"""convert: which layers are trained in low precision, why the others are not, and that nothing else about a model changes."""

import dataclasses

import pytest
import torch
from torch import nn

from lowp.errors import MisfitError, SpellingError
from lowp.train import RECIPES, Linear, convert, gather_codes, revert


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
        self.odd = nn.Linear(32, 10)

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids)))


def made(report):
    return {row.fqn: row.recipe for row in report.rows}


def test_rules_match_as_those_of_quantize():
    model = Tied()
    report = convert(model, "mxfp8", rules={"*head": None, "re:mlp\\.0": "int8"}, keep_small=False)
    assert made(report) == {"embed.weight": None, "mlp.0.weight": "int8", "mlp.2.weight": None, "odd.weight": None}
    assert [type(m) is Linear for m in (model.head, model.mlp[0], model.mlp[2], model.odd)] == [
        False,
        True,
        False,
        False,
    ]
    reasons = {row.fqn: row.why for row in report.rows}
    assert reasons["mlp.2.weight"] == "skipped: mxfp8 wants columns in multiples of 32, got 48."
    assert reasons["odd.weight"] == "skipped: mxfp8 wants rows in multiples of 32, got 10."
    assert reasons["embed.weight"] == "rule '*head' keeps it"
    assert "mlp.0.weight" in str(report) and report.to_dict()["rows"][1]["shape"] == [48, 32]


def test_a_tied_head_is_converted_and_stays_tied():
    model = Tied()
    ids = torch.arange(8)[None]
    before = model(ids)
    report = convert(model, "float8_rowwise", keep_small=False)
    assert made(report)["embed.weight"] == "float8_rowwise"
    assert type(model.head) is Linear and model.head.weight is model.embed.weight
    assert 0 < (model(ids) - before).norm() / before.norm() < 0.2


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_parameters_state_dict_and_optimizer_see_nothing(recipe):
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    convert(model, recipe, keep_small=False)
    assert [id(p) for p in model.parameters()] == before and list(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter for p in model.parameters())
    ids, losses = torch.arange(16)[None], []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(ids)[0], ids[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    plain = Tied()
    plain.load_state_dict(model.state_dict())
    revert(model)
    assert type(model.head) is nn.Linear and torch.equal(model(ids), plain(ids))


def test_small_layers_stay_unless_a_rule_names_them():
    def model():
        return nn.ModuleDict({"small": nn.Linear(1024, 512), "wide": nn.Linear(4096, 4112, device="meta")})

    report = convert(model(), "float8_rowwise")
    assert made(report) == {"small.weight": None, "wide.weight": "float8_rowwise"}
    assert report.rows[0].why == "kept: 512x1024 is too small to gain by float8_rowwise"
    assert (
        made(convert(model(), "float8_rowwise", rules={"small": "float8_rowwise"}))["small.weight"] == "float8_rowwise"
    )
    assert made(convert(model(), "float8_rowwise", keep_small=False))["small.weight"] == "float8_rowwise"


def test_how_it_is_computed_is_said():
    report = convert(nn.Linear(64, 64), "mxfp8", keep_small=False)
    assert report.rows[0].how.startswith("emulated: e4m3 decoded to fp32") and report.rows[0].fallback
    report = convert(nn.Linear(64, 64), "int8", keep_small=False)
    assert report.rows[0].how.startswith("native: int8 products") and not report.rows[0].fallback


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Mine(32, 32), nn.MultiheadAttention(32, 2))
    why = {row.fqn: row.why for row in convert(model, "float8_rowwise", keep_small=False).rows}
    assert why["0.weight"] == "skipped: Mine is a linear layer with a forward of its own."
    assert "NonDynamicallyQuantizableLinear" in why["1.out_proj.weight"]


def test_errors():
    with pytest.raises(SpellingError, match="matches no layer"):
        convert(Tied(), rules={"mpl": None})
    with pytest.raises(SpellingError, match="did you mean 'mxfp8'"):
        convert(Tied(), rules={"mlp.0": "mxfp9"})
    model = Tied()
    with pytest.raises(MisfitError, match=r"odd\.weight cannot be trained by int8: .*on_misfit='skip'"):
        convert(model, "int8", keep_small=False, on_misfit="error")
    assert not any(type(m) is Linear for m in model.modules()), "nothing is changed before everything fits"


def test_a_rule_may_give_a_recipe_of_your_own():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    nearest = dataclasses.replace(RECIPES["int8"], stochastic=False)
    mine = dataclasses.replace(RECIPES["int8"], name="mine")
    report = convert(model, "int8", rules={"0": nearest, "1": mine}, keep_small=False)
    assert [layer.recipe for layer in model] == [nearest, mine, RECIPES["int8"]]
    assert [row.recipe for row in report.rows] == ["int8", "mine", "int8"]


def test_what_is_no_linear_layer_is_listed_and_refused():
    class Conv1D(nn.Module):  # as transformers has it
        def __init__(self):
            super().__init__()
            self.nf, self.nx = 32, 32
            self.weight, self.bias = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.zeros(32))

    model = nn.ModuleDict({"c": Conv1D(), "e": nn.Embedding(32, 32), "l": nn.Linear(32, 32), "k": nn.Conv2d(2, 2, 3)})
    report = convert(model, "int8", rules={"e": "int8"}, keep_small=False)
    rows = {row.fqn: (row.recipe, row.why) for row in report.rows}
    assert rows["e.weight"] == (None, "skipped: Embedding is no nn.Linear.") and rows["l.weight"][0] == "int8"
    assert rows["c.weight"] == (None, "skipped: Conv1D is no nn.Linear.") and "k.weight" not in rows
    with pytest.raises(MisfitError, match=r"k\.weight cannot be trained by int8: Conv2d is no nn\.Linear"):
        convert(model, "int8", rules={"k": "int8", "c": None}, on_misfit="error")


def test_revert_undoes_subclasses_and_refuses_what_it_cannot_undo():
    from lowp.torchao.float8_training import Float8Linear

    class Sub(Linear):
        pass

    model = nn.Sequential(Float8Linear.from_float(nn.Linear(32, 32)), Sub(32, 32))
    assert [type(layer) for layer in revert(model)] == [nn.Linear] * 2 and "recipe" not in vars(model[0])
    convert(model, "float8_rowwise", keep_small=False)
    gather_codes(model)
    with pytest.raises(
        MisfitError, match="revert wants layers whose weights are whole and plain, got 0, 1: call it before"
    ):
        revert(model)
    assert type(model[0]) is Linear
