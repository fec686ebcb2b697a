"""Rules, targets and the plan: the first match wins, what matches nothing is an error, the plan changes nothing."""

import pytest
import torch
from torch import nn

import lowp
from lowp.errors import MisfitError, QuantizedError, SpellingError
from lowp.quantize.match import targets


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is (in, out)."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.05)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 64, 128) * 0.05)

    def forward(self, x):
        return torch.bmm(x, self.up_proj)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 128)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(128, 256), "down": nn.Linear(256, 128, bias=False)}) for _ in range(2)
        )
        self.conv = nn.Conv2d(4, 64, 2)
        self.gpt = Conv1D(128, 64)
        self.experts = Experts()
        self.norm = nn.LayerNorm(128)
        self.head = nn.Linear(128, 96, bias=False)
        self.head.weight = self.embed.weight


def schemes(plan):
    return {row.fqn: row.scheme for row in plan.rows}


def test_targets_find_every_kind_and_tied_weights_once():
    found = {t.fqn: (t.kind, t.tied, t.matrix_shape) for t in targets(Model())}
    assert found["embed.weight"] == ("linear", ("head.weight",), (96, 128))
    assert found["conv.weight"] == ("conv", (), (64, 16))
    assert found["gpt.weight"] == ("conv1d", (), (64, 128))
    assert found["experts.up_proj"] == ("experts", (), (4, 64, 128))
    assert "head.weight" not in found and "norm.weight" not in found and "layers.0.up.bias" not in found


def test_first_match_wins_and_every_kind_of_pattern():
    rules = {
        "re:layers\\.0\\.(up|down)": "int8",
        "*.down.weight": "fp8",
        lambda name, module: isinstance(module, Conv1D): "int4/1x32",
        "head": None,
        "*": "int6/1x128*bf16",
    }
    assert schemes(lowp.plan(Model(), rules)) == {
        "embed.weight": None,
        "layers.0.up.weight": "int8/row",
        "layers.0.down.weight": "int8/row",
        "layers.1.up.weight": "int6/1x128*bf16",
        "layers.1.down.weight": "e4m3/row",
        "conv.weight": None,
        "gpt.weight": "int4/1x32",
        "experts.up_proj": "int6/1x128*bf16",
    }


def test_a_bare_star_leaves_embeddings_and_convolutions_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "conv": nn.Conv1d(4, 8, 4), "linear": nn.Linear(64, 64)})
    assert [row.scheme for row in lowp.plan(model, "int8").rows] == [None, None, "int8/row"]
    assert [row.scheme for row in lowp.plan(model, {"embed": "int8", "conv*": "int8", "*": None}).rows] == [
        "int8/row",
        "int8/row",
        None,
    ]


def test_the_plan_is_pure_printable_and_works_on_meta():
    model = Model()
    model.bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    text = str(lowp.plan(model.bfloat16(), "int8"))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert "layers.0.up.weight" in text and "int8pack_cpu" in text and "no rule matches" in text
    with torch.device("meta"):
        assert schemes(lowp.plan(Model().bfloat16(), "int8")) == schemes(lowp.plan(model, "int8"))


def test_errors_say_what_to_do():
    model = Model()
    with pytest.raises(SpellingError, match=r"'layer\.0\.up' matches no layer.*layers\.0\.up"):
        lowp.plan(model, {"layer.0.up": "int8"})
    with pytest.raises(SpellingError, match="not a regular expression"):
        lowp.plan(model, {"re:(": "int8"})
    with pytest.raises(SpellingError, match="did you mean"):
        lowp.plan(model, "int44")
    with pytest.raises(SpellingError, match="hqq"):
        lowp.plan(model, "int4", method="hqqq")
    with pytest.raises(SpellingError, match="rules want a scheme"):
        lowp.plan(model, {})
    with pytest.raises(MisfitError, match=r"layers\.0\.up\.weight.*1x64.*on_misfit='skip'"):
        lowp.plan(model, {"layers.0.up": "int4/1x96"})
    with pytest.raises(MisfitError, match="half of the weights would vanish"):
        lowp.plan(model, {"layers.0.up": "int1/1x32"})
    with pytest.raises(SpellingError, match="on_misfit"):
        lowp.plan(model, "int4", on_misfit="ignore")
    with pytest.raises(MisfitError, match="no activation to quantize"):
        lowp.plan(nn.ModuleDict({"e": nn.Embedding(64, 64)}), {"e": "int8/row@int8/row"})


def test_skip_is_a_line_in_the_plan():
    plan = lowp.plan(Model(), {"layers.*": "int4/1x96"}, on_misfit="skip")
    skipped = [row for row in plan.rows if row.why.startswith("skipped")]
    assert len(skipped) == 4 and all("multiples of 1 x 96" in row.why for row in skipped)


def test_quantizing_twice_is_an_error():
    model = Model()
    lowp.quantize_(model, {"layers.0.*": "int8"})
    with pytest.raises(QuantizedError, match=r"layers\.0\.up\.weight is quantized already"):
        lowp.quantize_(model, "int8")
    lowp.quantize_(model, {"layers.0.*": None, "layers.1.*": "int8"})
