"""The calibration driver: blocks, files, resuming after kill -9, limits of memory, experts, ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import lowp
from lowp.integrations.transformers import empty_model, load, sources
from lowp.quantize import METHODS, Method
from lowp.quantize.apply import _InPlace
from lowp.quantize.blocks import chain_of
from lowp.quantize.calibrate import How
from lowp.quantize.calibrate_files import _digest, calibrate_files
from lowp.quantize.checkpoint import load_state
from lowp.quantize.method import method_of
from lowp.quantize.shards import read_directory
from lowp.quantize.stream import work_directory

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip
RULES = {"lm_head": None, "*": "int4/1x32*bf16"}
CPU = torch.device("cpu")


def batches(count=3):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 96, (4, 32), generator=generator) for _ in range(count)]


def llama(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes), architectures=["LlamaForCausalLM"])).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model


def convert(floats, out, method="gptq", rules=RULES, data=None, **how):
    """From files to files, as the command line does it."""
    model = empty_model(floats)
    found, tied, _ = sources(model, read_directory(floats))
    how = How(method=method_of(method), device=CPU, home=CPU, **how)
    return calibrate_files(model, found, rules, out, batches=data or batches(), tied=tied, config_from=floats, how=how)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_decoder_are_found_and_run_as_the_model_does():
    model = llama()
    chain = chain_of(model, batches()[0], CPU)
    assert chain.names == tuple(f"model.layers.{i}" for i in range(3))
    hidden, calls = chain.calls(batches()[0])
    for call, block in zip(calls, chain.blocks, strict=True):
        hidden = call.run(block, hidden)
    assert torch.equal(chain.finish(batches()[0], hidden).logits, model(batches()[0]).logits)
    assert all("forward" not in vars(block) for block in chain.blocks)


class Twice(nn.Module):
    """Blocks that run twice: no chain."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        for block in (*self.blocks, *self.blocks):
            x = block(x).relu()
        return x


class Tuples(nn.Module):
    """Blocks that answer tuples, as many models do."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, hidden, scale):
            return hidden + self.down(self.up(hidden * scale).relu()), scale

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(self.Inner() for _ in range(3)), nn.Linear(32, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=torch.tensor(2.0))[0]
        return self.head(x)


@pytest.mark.parametrize("make, blocks", [(Twice, 0), (Tuples, 3), (lambda: nn.Sequential(nn.Linear(32, 32)), 0)])
def test_other_models_are_a_chain_or_one_block(make, blocks):
    model, data = make().eval(), [torch.randn(64, 32) for _ in range(2)]
    assert len(chain_of(model, data[0], CPU).names) == blocks
    before = model(data[0])
    report = lowp.quantize_(model, "int4/1x32", method="gptq", data=data)
    assert all(row.output_error < row.rounding_error for row in report.rows)
    assert 0 < (model(data[0]) - before).norm() < 0.5 * before.norm()


# -- every method -----------------------------------------------------------------------------------------------------

COMBINED = ["gptq", "awq", "smoothquant", "rotate+gptq", "awq+gptq"]


@pytest.mark.parametrize("scheme", ["int4/1x32*bf16", "int8/row@int8/row"])
@pytest.mark.parametrize("method", COMBINED)
def test_every_method_leaves_a_model_that_runs_saves_and_loads(method, scheme, tmp_path):
    model = llama()
    expected = model(batches()[0]).logits
    report = lowp.quantize_(model, {"lm_head": None, "*": scheme}, method=method, data=batches())
    got = model(batches()[0]).logits
    assert (got - expected).norm() < 0.6 * expected.norm()
    lowp.save(model, tmp_path / "out")
    assert torch.equal(lowp.load(tmp_path / "out")(batches()[0]).logits, got)
    if "gptq" in method:
        assert all(row.output_error < row.rounding_error for row in report.rows if row.scheme)


def test_gptq_beats_rounding_on_the_logits():
    errors = {}
    for method in ("absmax", "gptq"):
        model = llama()
        expected = model(batches()[0]).logits
        lowp.quantize_(model, RULES, method=method, **({"data": batches()} if method != "absmax" else {}))
        errors[method] = (model(batches()[0]).logits - expected).norm()
    assert errors["gptq"] < 0.85 * errors["absmax"]


def test_floats_again_say_the_same_where_a_factor_stayed_with_the_weight():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x):
            return self.down(self.up(x).sigmoid() * torch.linspace(0.1, 9, 64))

    torch.manual_seed(0)
    model, data = Gated().eval(), [torch.randn(300, 64)]
    report = lowp.quantize_(model, "int4/1x32", method="awq", data=data)
    assert any("act_pre_scale" in row.why for row in report.rows)
    expected = model(data[0])
    assert (lowp.dequantize_(model)(data[0]) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("how", [{"propagate": "float"}, {"sequential": False}])
def test_options_change_what_layers_see(how):
    plain, other = llama(), llama()
    lowp.quantize_(plain, RULES, method="gptq", data=batches())
    lowp.quantize_(other, RULES, method="gptq", data=batches(), **how)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(plain.get_parameter(name).dequantize(), other.get_parameter(name).dequantize())


def test_tied_weights_stay_one(tmp_path):
    model = llama(tie_word_embeddings=True)
    report = lowp.quantize_(model, "int4/1x32*bf16", method="awq", data=batches())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "tied" in next(row.why for row in report.rows if row.tied)


def test_embeddings_and_layers_without_tokens_are_rounded_and_the_report_says_so():
    model = llama()
    model.model.layers[0].spare = nn.Linear(64, 64)
    report = lowp.quantize_(model, {"*embed_tokens": "int8/row", "*": "int4/1x32"}, method="gptq", data=batches())
    whys = {row.fqn: row.why for row in report.rows}
    for name in ("model.embed_tokens.weight", "model.layers.0.spare.weight"):
        assert "no token reached it, or not by a product" in whys[name]


# -- experts ----------------------------------------------------------------------------------------------------------


def test_experts_have_statistics_of_their_own_and_those_without_tokens_are_named():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2)
    model = MixtralForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[4] = -100.0 * layer.mlp.gate.weight.data[:4].sum(0).sign()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(1.0)
    report = lowp.quantize_(model, {"*experts*": "int4/1x32"}, method="gptq", data=batches(1))
    rows = [row for row in report.rows if row.scheme]
    assert rows and all(row.output_error < row.rounding_error for row in rows)
    assert any("experts" in row.why and "fewer tokens than columns" in row.why for row in rows)


# -- static scales ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", ["minmax", "average", "percentile", "mse"])
@pytest.mark.parametrize("scheme", ["int8/row@int8/tensor", "e4m3/row@e4m3/tensor"])
def test_static_scales_are_stored_and_used(static, scheme, tmp_path):
    model = llama()
    expected = model(batches()[0]).logits
    lowp.quantize_(model, {"lm_head": None, "*": scheme}, method="smoothquant", data=batches(), static=static)
    got = model(batches()[0]).logits
    assert (got - expected).norm() < 0.25 * expected.norm()
    assert "act_scale" in model.model.layers[0].mlp.up_proj.weight.packed
    lowp.save(model, tmp_path / "out")
    assert torch.equal(lowp.load(tmp_path / "out")(batches()[0]).logits, got)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "quarot+gptq", "smoothquant"])
def test_files_hold_what_quantize_and_save_would(method, floats, tmp_path):
    model = load(floats)
    report = lowp.quantize_(model, RULES, method=method, data=batches())
    written = convert(floats, tmp_path / "out", method)
    state, own = load_state(tmp_path / "out"), dict(model.state_dict(keep_vars=True))
    assert set(state) == set(own)
    for name, tensor in own.items():
        if isinstance(tensor, lowp.QTensor):
            packed = tensor.to_layout("plain").packed
            assert {n: t.tolist() for n, t in packed.items()} == {n: t.tolist() for n, t in state[name].packed.items()}
        else:
            assert torch.equal(tensor, state[name]), name
    errors = {row.fqn: row.output_error for row in report.rows if row.scheme}
    assert {row.fqn: row.output_error for row in written.rows if row.scheme} == errors
    loaded = lowp.load(tmp_path / "out")
    assert torch.equal(loaded(batches()[0]).logits, model(batches()[0]).logits)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads({threads})
from test_calibrate import convert
from lowp.quantize import block

def slow(name, done, total):
    print("block", done, flush=True)

quantize = block.Block._round
def noted(self, group, statistics):
    print(group.rows[0][0].fqn, flush=True)
    return quantize(self, group, statistics)
block.Block._round = noted
convert({floats!r}, {out!r}, progress=slow)
"""


@pytest.mark.parametrize("where", ["model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"])
def test_a_killed_process_goes_on_and_ends_with_the_same_bytes(where, floats, tmp_path):
    """kill -9 in the middle of a block: no time to say anything."""
    script = KILLED.format(
        tests=str(Path(__file__).parent), floats=str(floats), out=str(tmp_path / "out"),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    source = Path(lowp.__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == where:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    entries = (work_directory(tmp_path / "out") / "journal.jsonl").read_text().splitlines()
    assert len(entries) == 1 + int(where.split(".")[2])
    seen = []
    convert(floats, tmp_path / "out", progress=lambda name, done, total: seen.append(name))
    assert [name for name in seen if name.startswith("model")] == [
        f"model.layers.{i}" for i in range(len(entries) - 1, 3)
    ]
    convert(floats, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_other_data_or_options_do_not_go_on_with_unfinished_work(floats, tmp_path):
    from lowp.methods import gptq

    def stop(name, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(floats, tmp_path / "out", progress=stop)
    with pytest.raises(lowp.LowpError, match="unfinished work of another kind"):
        convert(floats, tmp_path / "out", data=batches(2))
    with pytest.raises(lowp.LowpError, match="unfinished work of another kind"):
        convert(floats, tmp_path / "out", gptq.method(damp=0.5))
    first, second = batches(2)
    pairs = [{"a": first, "b": second}, {"a": second, "b": first}, {"a": first, "b": 1}, {"a": first, "b": 2}]
    assert len({_digest([pair]) for pair in pairs}) == 4


def test_a_tied_head_is_calibrated_from_files_as_in_memory(floats, tmp_path):
    model = load(floats)
    report = lowp.quantize_(model, "int4/1x32*bf16", method="gptq", data=batches())
    written = convert(floats, tmp_path / "out", rules="int4/1x32*bf16")
    errors = [{row.fqn: row.output_error for row in r.rows if row.scheme} for r in (report, written)]
    assert errors[0] == errors[1] and not any(error != error for error in errors[0].values())


def test_a_rotation_unties_in_the_files_too(floats, tmp_path):
    convert(floats, tmp_path / "out", "rotate+gptq")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_a_rotation_untied_is_saved_beside_the_floats_configuration_and_loads(floats, tmp_path):
    model = load(floats)
    lowp.quantize_(model, {"lm_head": None, "*": "int8/row"}, method="rotate")
    lowp.save(model, tmp_path / "out", config_from=floats)
    assert torch.equal(lowp.load(tmp_path / "out")(batches()[0]).logits, model(batches()[0]).logits)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_limit_that_one_layer_exceeds_is_an_error_that_says_how_much():
    with pytest.raises(lowp.LowpError, match="GB to be calibrated"):
        lowp.quantize_(llama(), RULES, method="gptq", data=batches(), max_ram="1M")


def test_a_block_that_exceeds_the_limit_is_not_even_read(floats, tmp_path, monkeypatch):
    from lowp.quantize import calibrate_files as module

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(module._Files, "_read", read)
    with pytest.raises(lowp.LowpError, match=r"wants 0\.\d+ GB for its weights"):
        convert(floats, tmp_path / "out", limit=1000)


PROMISE = """
import os, threading, time
import torch
import lowp
from lowp.quantize import block
from lowp.quantize.memory import in_use

torch.set_num_threads(1)
CPU, most, promised = torch.device("cpu"), [0], []
page = os.sysconf("SC_PAGE_SIZE")


def poll():
    while True:
        most[0] = max(most[0], int(open("/proc/self/statm").read().split()[1]) * page)
        time.sleep(0.001)


def check(self, groups):
    if groups:
        promised.append((in_use(CPU), sum(group.nbytes for group in groups)))
        most[0] = 0


lowp.quantize_(torch.nn.Sequential(torch.nn.Linear(128, 64)), "int4/1x32", method="gptq", data=[torch.randn(256, 128)])
block.Block._check_memory = check
threading.Thread(target=poll, daemon=True).start()
for columns, rows in ((2304, 128), (256, 8192)):
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
    data = [torch.randn(128, columns, dtype=torch.bfloat16)]
    lowp.quantize_(model, "int4/1x64*bf16", method="gptq", data=data, max_ram="20GB")
    before, wanted = promised[-1]
    print(wanted, most[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="wants /proc to ask for the resident set")
def test_rounding_a_wide_or_a_tall_layer_takes_no_more_than_was_promised():
    source = Path(lowp.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", PROMISE], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for line in run.stdout.splitlines():
        promised, taken = map(int, line.split())
        assert 0.4 * promised < taken <= promised, line


@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_hidden_states_in_files_change_nothing(propagate):
    spilled, kept = llama(), llama()
    lowp.quantize_(spilled, RULES, method="gptq", data=batches(), max_ram="64GB", propagate=propagate)
    lowp.quantize_(kept, RULES, method="gptq", data=batches(), propagate=propagate)
    assert torch.equal(spilled(batches()[0]).logits, kept(batches()[0]).logits)


class Residual(nn.Module):
    """Blocks that add to their input, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.blocks, self.in_place = nn.ModuleList(self.Inner(in_place) for _ in range(3)), in_place

    class Inner(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.linear, self.in_place = nn.Linear(32, 32), in_place

        def forward(self, hidden):
            if self.in_place:
                hidden += self.linear(hidden).relu()
                return hidden
            return hidden + self.linear(hidden).relu()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_that_work_in_place_give_the_same():
    made = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = Residual(in_place).eval()
        data = [torch.randn(64, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        lowp.quantize_(model, "int3/1x32", method="gptq", data=[x.clone() for x in data])
        made.append([block.linear.weight.dequantize() for block in model.blocks])
    assert all(torch.equal(x, y) for x, y in zip(*made, strict=True))


def test_float_propagation_calibrates_on_what_the_float_model_sees():
    """Against sums taken by a hook on the untouched model."""
    model, name, sums = llama(), "model.layers.2.self_attn.q_proj", []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: sums.append(args[0].flatten(0, 1)))
    for batch in batches():
        model(batch)
    hook.remove()
    seen = []

    def spy(weight, statistics, fmt):
        seen.append(statistics.hessian_KK)
        return METHODS["absmax"].run(weight, statistics, fmt)

    own = Method(name="spy", about="", run=spy, why_not=lambda fmt: "", wants_data=True)
    report = lowp.quantize_(model, {"lm_head": None, "*": "int2/1x32"}, method=own, data=batches(), propagate="float")
    index = [row.fqn for row in report.rows if row.scheme].index(f"{name}.weight")
    expected = sum(x.T @ x for x in sums)
    assert torch.allclose(seen[index], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


WRONG = {
    "rules": {"rules": {"nothing": "int4"}},
    "memory": {"max_ram": "x"},
    "one batch": {"data": torch.zeros(4, 32, dtype=torch.int64)},
    "propagate": {"propagate": "x"},
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_errors_that_can_be_known_before_leave_the_model_as_it_was(wrong):
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    given = dict(rules=RULES, method="rotate+gptq", data=batches()) | WRONG[wrong]
    with pytest.raises(lowp.LowpError):
        lowp.quantize_(model, given.pop("rules"), **given)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# -- ranks ------------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Two experts, chosen by the sign of the first number: a rank may see one of them only."""

    def __init__(self):
        super().__init__()
        self.before, self.experts = nn.Linear(32, 32), nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        hidden, first = self.before(x).relu(), x[:, 0] > 0
        answer = torch.zeros_like(hidden)
        for mask, expert in zip((first, ~first), self.experts, strict=True):
            if mask.any():
                answer[mask] = expert(hidden[mask])
        return answer


def routed():
    torch.manual_seed(0)
    data = [torch.randn(96, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for index, x in enumerate(data):
        x[:, 0] = x[:, 0].abs() * (1 if index % 2 else -1)
    return Routed().eval(), data


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
import lowp
from test_calibrate import RULES, batches, llama, routed
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size=2)
model, (other, data) = llama(num_hidden_layers=1), routed()
lowp.quantize_(model, RULES, method="gptq", data=batches(4)[rank::2], distributed=True)
report = lowp.quantize_(other, "int4/1x32", method="gptq", data=data[rank::2], distributed=True)
assert not any("no token" in row.why for row in report.rows), report
state = {{n: p.dequantize() for m in (model, other) for n, p in m.named_parameters() if isinstance(p, lowp.QTensor)}}
torch.save(state, f"{folder}/{{rank}}.pt")
dist.destroy_process_group()
"""


@pytest.mark.multi
def test_two_ranks_give_the_same_as_one(tmp_path):
    """Same: both ranks the same bits, and the same values as one process but where sums in another order tip a rounding."""
    script = RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    source = Path(lowp.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(source)}
    children = [subprocess.Popen([sys.executable, "-c", script, str(rank)], env=env) for rank in range(2)]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model, (other, data) = llama(num_hidden_layers=1), routed()
    lowp.quantize_(model, RULES, method="gptq", data=batches(4))
    lowp.quantize_(other, "int4/1x32", method="gptq", data=data)
    one = {n: p.dequantize() for m in (model, other) for n, p in m.named_parameters() if isinstance(p, lowp.QTensor)}
    assert set(one) == set(first) == set(second)
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert (weight == one[name]).double().mean() > 0.99, name


def test_methods_that_want_data_say_so():
    assert {name for name, method in METHODS.items() if method.wants_data} >= {"gptq", "awq", "smoothquant"}


# -- padding ----------------------------------------------------------------------------------------------------------


def padded(model, side):
    """Two batches with padding that is nothing like text, and the same sequences one by one without it."""
    generator = torch.Generator().manual_seed(3)
    batches, alone = [], []
    for lengths in ((32, 20, 9), (27, 32)):
        ids, mask = torch.zeros(len(lengths), 32, dtype=torch.int64), torch.zeros(len(lengths), 32, dtype=torch.int64)
        for row, length in enumerate(lengths):
            real = torch.randint(1, 96, (length,), generator=generator)
            at = slice(0, length) if side == "right" else slice(32 - length, 32)
            ids[row, at], mask[row, at] = real, 1
            alone.append({"input_ids": real.unsqueeze(0)})
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches, alone


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "mixtral grouped"])
def test_padding_is_no_data(kind, side):
    """What the layers see of padded batches is what they see of the sequences one by one."""

    def spy(weight, statistics, fmt):
        tokens[-1].append(statistics.tokens)
        hessians[-1].append(statistics.hessian_KK.clone())
        return METHODS["absmax"].run(weight, statistics, fmt)

    tokens, hessians = [], []
    own = Method(name="spy", about="", run=spy, why_not=lambda fmt: "", wants_data=True)
    for which in (0, 1):
        torch.manual_seed(0)
        tokens.append([]), hessians.append([])
        config = MixtralConfig(**SIZES | {"num_hidden_layers": 1}, num_local_experts=4, num_experts_per_tok=2)
        model = llama(num_hidden_layers=1) if kind == "llama" else MixtralForCausalLM(config).eval()
        if kind == "mixtral grouped":
            model.set_experts_implementation("grouped_mm")
        report = lowp.quantize_(model, {"lm_head": None, "*": "int8/row"}, method=own, data=padded(model, side)[which])
        assert not any("padding" in row.why for row in report.rows)
    assert tokens[0] == tokens[1]
    for a, b in zip(*hessians, strict=True):
        assert (a - b).norm() <= 2e-3 * b.norm()


class Folded(nn.Module):
    """Folds time into windows: which row is of which token cannot be told."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(96, 32), nn.Linear(64, 8)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        return self.linear(hidden.reshape(len(hidden), -1, 64))


def test_where_padding_cannot_be_told_the_report_says_so():
    model = Folded().eval()
    data, _ = padded(model, "right")
    report = lowp.quantize_(model, {"embedding": None, "*": "int4/1x32"}, method="gptq", data=data)
    assert any("padding counts as data" in row.why for row in report.rows)


# -- all or nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "rotate+smoothquant"])
def test_what_fails_in_mid_run_leaves_the_model_as_it_was(method):
    model = llama(tie_word_embeddings=True, attention_bias=True)
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: parameter.detach().clone() for name, parameter in before.items()}

    def stop(name, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowp.quantize_(model, "int8/row@int8/row", method=method, data=batches(), progress=stop)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before) and set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert model.config.tie_word_embeddings is True and not model.training


def test_what_was_brought_to_another_device_is_back_after_a_failure():
    """Buffers too. The device meta takes the place of one that this machine need not have."""
    model = llama()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    place = _InPlace(model, torch.device("meta"), copies=False)
    place.load(model)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    place.restore()
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())


def test_a_weight_that_is_not_finite_is_found_before_anything_changes():
    model = llama()
    model.model.layers[2].mlp.down_proj.weight.data[3, 4] = float("inf")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for method in ("absmax", "gptq"):
        with pytest.raises(lowp.LowpError, match=r"layers\.2\.mlp\.down_proj.*1 infinite"):
            lowp.quantize_(model, RULES, method=method, **({"data": batches()} if method == "gptq" else {}))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
