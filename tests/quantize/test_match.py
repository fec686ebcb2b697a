"""Rules, targets and the plan: the first match wins, what matches nothing is an error, the plan changes nothing."""

import importlib

import pytest
import torch
from torch import nn

import lowp
from lowp.errors import MisfitError, QuantizedError, SpellingError
from lowp.numerics.compare import relative_error
from lowp.ops import Case, best_layout
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
    assert "layers.0.up.weight" in text and "linear by " in text and "no rule matches" in text
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


def test_a_rule_of_many_names_does_not_fill_the_report():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(100)))
    plan = lowp.plan(model, {f"re:{'|'.join(map(str, range(100)))}": "int8/row"})
    assert {row.scheme for row in plan.rows} == {"int8/row"} and max(len(row.why) for row in plan.rows) < 140


@pytest.mark.parametrize("batch", ["a text", ["a text", "another"]])
def test_text_is_no_batch(batch):
    with pytest.raises(SpellingError, match=r"data wants .*batch"):
        lowp.quantize_(nn.Sequential(nn.Linear(64, 64)), "int4/1x32", method="gptq", data=batch)


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


class GroupedExperts(nn.Module):
    """As transformers has them: weights (E, N, K), tokens sorted by expert."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(4, 64, 128) * 0.05)
        self.down_proj = nn.Parameter(torch.randn(4, 128, 64) * 0.05)

    def forward(self, x_TK, offs):
        up = torch._grouped_mm(x_TK, self.up_proj.transpose(-2, -1), offs=offs)
        return torch._grouped_mm(up.relu(), self.down_proj.transpose(-2, -1), offs=offs)


class BatchedExperts(GroupedExperts):
    """As many tokens for each expert."""

    def forward(self, x_TK, offs):
        x_EMK = x_TK.view(4, -1, 128)
        return torch.bmm(torch.bmm(x_EMK, self.up_proj.mT).relu(), self.down_proj.mT).view(x_TK.shape)


@pytest.mark.parametrize(("kind", "op"), [(GroupedExperts, "grouped"), (BatchedExperts, "matmul")])
@pytest.mark.parametrize("scheme", ["int8", "int4/1x32*bf16", "mxfp4"])
def test_experts_are_planned_for_the_kernels_that_run_them(monkeypatch, kind, op, scheme):
    model, ran = kind().bfloat16(), []
    module = importlib.import_module(f"lowp.ops.{op}")
    chooser = "pick" if op == "grouped" else "picked"
    choose = getattr(module, chooser)
    monkeypatch.setattr(module, chooser, lambda *args: ran.append(choose(*args)) or ran[-1])
    report = lowp.quantize_(model, scheme)
    x_TK, offs = torch.randn(8, 128).bfloat16(), torch.arange(2, 9, 2, dtype=torch.int32)
    with torch.no_grad():
        y = model(x_TK, offs)
        expected = lowp.dequantize_(model)(x_TK, offs)
    assert relative_error(expected, y) < 0.02
    assert [(kernel.op, kernel.name) for kernel in ran] == [(op, row.kernel) for row in report.rows]
    assert all(f"{op} by {kernel.name}" in row.why for kernel, row in zip(ran, report.rows, strict=True))


def test_experts_on_a_gpu_are_planned_for_both_products(monkeypatch):
    monkeypatch.setattr("lowp.quantize.match.device_capability", lambda device, index: 90)
    for row in lowp.plan(GroupedExperts().bfloat16(), "int4/1x64*bf16", device="cuda").rows:
        case = Case(op="grouped", scheme=row.scheme, device="cuda", sm=90, shape=row.shape)
        layout, kernels, why = best_layout(("grouped", "matmul"), case)
        assert (row.layout, row.kernel) == (layout, "+".join(dict.fromkeys(kernel.name for kernel in kernels)))
        assert why in row.why and [kernel.op for kernel in kernels] == ["grouped", "matmul"]
