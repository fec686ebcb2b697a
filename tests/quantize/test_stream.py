"""Streaming equals quantizing in memory, to the bit; a run that was stopped goes on and ends in the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import lowp
from lowp.errors import CheckpointError, MisfitError, QuantizedError
from lowp.numerics import Scheme, known_formats
from lowp.quantize import journal as journals
from lowp.quantize import shards, stream
from lowp.quantize.checkpoint import load_state, read_contents, save
from lowp.quantize.stream import Source, quantize_files, work_directory

SCHEMES = list(dict.fromkeys(str(Scheme.parse(known.spelling)) for known in known_formats()))


class Stack(nn.Module):
    """Three experts of 256 x 256."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 256, 256))


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    torch.manual_seed(0)
    parts = dict(
        embed=nn.Embedding(256, 256),
        first=nn.Linear(256, 384),
        norm=nn.LayerNorm(256),
        experts=Stack(),
        head=nn.Linear(256, 256),
    )
    model = nn.ModuleDict(parts).to(dtype)
    model["head"].weight = model["embed"].weight
    return model


def sources_of(folder: Path, model: nn.Module) -> tuple[dict[str, Source], dict[str, str]]:
    stored = shards.read_directory(folder)
    state = {
        name: Source(shape=tuple(model.state_dict()[name].shape), pieces=(stored[name],))
        for name in model.state_dict()
        if name in stored
    }
    return state, read_contents(folder).tied


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    return save(model_of(), tmp_path / "floats")


def convert(floats: Path, out: Path, rules, *, method: str = "absmax", **options):
    model = model_of()
    sources, tied = sources_of(floats, model)
    plan = lowp.plan(model, rules, method=method, on_misfit="skip")
    return quantize_files(sources, plan, out, tied=tied, method=method, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setattr(stream, "_SLAB", 8192)  # 32 rows of 256


# -- the same as in memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_streaming_equals_quantizing_in_memory(scheme, tmp_path, floats, small_slabs):
    rules = {"embed": scheme.split("@")[0], "*": scheme}
    report = convert(floats, tmp_path / "out", rules)
    model = model_of()
    expected = lowp.quantize_(model, rules, on_misfit="skip")
    save(model, tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    rows = {row.fqn: row for row in report.rows}
    for row in expected.rows:
        mine = rows[row.fqn]
        assert (mine.scheme, mine.kernel, mine.layout, mine.why, mine.tied) == (
            row.scheme,
            row.kernel,
            row.layout,
            row.why,
            row.tied,
        )
        assert mine.error == pytest.approx(row.error, rel=1e-5)


@pytest.mark.parametrize("method", ["mse", "hqq"])
@pytest.mark.parametrize(
    "scheme",
    ["int4/1x128*bf16", "int4/1x64*bf16+bf16", "int2/1x32*bf16+bf16", "int8/tensor", "e4m3/128x128", "int3/row"],
)
def test_streaming_equals_quantizing_in_memory_for_each_method(method, scheme, tmp_path, floats, small_slabs):
    convert(floats, tmp_path / "out", scheme, method=method)
    model = model_of()
    lowp.quantize_(model, scheme, method=method)
    save(model, tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_slabs_are_used_where_the_format_allows(floats, small_slabs):
    model = model_of()
    sources, _ = sources_of(floats, model)

    def step(scheme: str, name: str = "first.weight", method: str = "absmax") -> int:
        row = next(row for row in lowp.plan(model, {"embed": scheme, "*": scheme}).rows if row.fqn == name)
        return stream._unit(name, sources[name], row, method).step

    assert step("int4/1x128*bf16") == 32
    assert step("e4m3/128x128") == 128
    assert step("int8/tensor") == 384
    assert step("e2m1/1x16*e4m3/tensor") == 384
    assert step("int4/1x128*bf16", method="hqq") == 32
    assert step("e4m3/row", method="hqq") == 32  # hqq is for integers: it falls back to absmax
    assert step("int4/1x128*bf16", "experts.up") == 1  # one expert
    assert step("int8/tensor", "experts.up") == 1


def test_pieces_of_a_stack_equal_the_stack(tmp_path, small_slabs):
    """Experts stored one by one, gate and up apart, are the stack that they make."""
    gates, ups = torch.randn(3, 128, 256), torch.randn(3, 128, 256)
    apart = nn.ParameterDict(
        {f"e{i}_{kind}": t[i].clone() for i in range(3) for kind, t in (("gate", gates), ("up", ups))}
    )
    stored = shards.read_directory(save(apart, tmp_path / "apart"))
    model = nn.ModuleDict({"experts": Stack()})
    model["experts"].up = nn.Parameter(torch.cat([gates, ups], dim=1))
    for scheme in ("int4/1x128*bf16", "int8/tensor", "e4m3/128x128", "e2m1/1x16*e4m3/tensor", "nf4"):
        pieces = tuple(stored[f"e{i}_{kind}"] for i in range(3) for kind in ("gate", "up"))
        source = {"experts.up": Source(shape=(3, 256, 256), pieces=pieces)}
        name = scheme.replace("/", "_")
        quantize_files(source, lowp.plan(model, scheme), tmp_path / name, tied={})
        whole = nn.ModuleDict({"experts": Stack()})
        whole["experts"].up = nn.Parameter(model["experts"].up.detach().clone())
        lowp.quantize_(whole, scheme)
        save(whole, tmp_path / f"{name}.expected")
        assert files_of(tmp_path / name) == files_of(tmp_path / f"{name}.expected")


def test_shards_have_the_size_asked_for(tmp_path, floats):
    convert(floats, tmp_path / "one", "int4")
    convert(floats, tmp_path / "many", "int4", shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_state(tmp_path / "one"), load_state(tmp_path / "many")
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert torch.equal(getattr(tensor, "qdata", tensor), getattr(many[name], "qdata", many[name]))


# -- stopped and resumed ----------------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    """Ctrl-C."""


def stop_at(name: str):
    def progress(current: str, done: int, total: int) -> None:
        if current == name:
            raise Stop

    return progress


@pytest.mark.parametrize("where", ["embed.weight", "first.weight", "experts.up", "head.bias"])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(where, tmp_path, floats, small_slabs):
    convert(floats, tmp_path / "whole", "int4")
    with pytest.raises(Stop):
        convert(floats, tmp_path / "out", "int4", progress=stop_at(where))
    assert not (tmp_path / "out").exists() and work_directory(tmp_path / "out").is_dir()
    seen = []
    report = convert(
        floats, tmp_path / "out", "int4", progress=lambda name, done, total: seen.append((name, done, total))
    )
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not work_directory(tmp_path / "out").exists()
    finished = list(model_of().state_dict())[: list(model_of().state_dict()).index(where)]
    assert not {name for name, _, _ in seen} & set(finished)  # what was done is not done again
    assert seen[-1][1] == seen[-1][2]
    again = convert(floats, tmp_path / "again", "int4")
    assert [row.error for row in report.rows] == [row.error for row in again.rows]


def test_a_stop_while_sealing_goes_on(tmp_path, floats, monkeypatch):
    def stop(*args):
        raise Stop

    for name in ("seal", "publish"):
        with monkeypatch.context() as patch:
            patch.setattr(stream, name, stop)
            with pytest.raises(Stop):
                convert(floats, tmp_path / "out", "int4", config_from=tmp_path)
    convert(floats, tmp_path / "out", "int4")
    convert(floats, tmp_path / "whole", "int4")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_half_a_line_in_the_journal_is_done_again(tmp_path, floats):
    with pytest.raises(Stop):
        convert(floats, tmp_path / "out", "int4", progress=stop_at("head.bias"))
    journal = work_directory(tmp_path / "out") / journals.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    convert(floats, tmp_path / "out", "int4")
    convert(floats, tmp_path / "whole", "int4")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_unfinished_work_of_another_kind_is_an_error(tmp_path, floats):
    with pytest.raises(Stop):
        convert(floats, tmp_path / "out", "int4", progress=stop_at("head.bias"))
    before = files_of(work_directory(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="unfinished work of another kind"):
        convert(floats, tmp_path / "out", "int8")
    assert files_of(work_directory(tmp_path / "out")) == before
    convert(floats, tmp_path / "out", "int8", overwrite=True)
    assert load_state(tmp_path / "out")["first.weight"].scheme == "int8/row"


def test_changed_input_is_work_of_another_kind(tmp_path, floats):
    with pytest.raises(Stop):
        convert(floats, tmp_path / "out", "int4", progress=stop_at("head.bias"))
    os.utime(floats / "model.safetensors", (1, 1))
    with pytest.raises(CheckpointError, match="other input"):
        convert(floats, tmp_path / "out", "int4")


def test_a_strange_work_directory_is_left_alone(tmp_path, floats):
    strange = work_directory(tmp_path / "out")
    strange.mkdir()
    (strange / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="remove it yourself"):
        convert(floats, tmp_path / "out", "int4", overwrite=True)
    assert (strange / "thesis.txt").read_text() == "years of work"


def test_two_at_once_is_an_error(tmp_path, floats):
    def second(name, done, total):
        if name == "experts.up":
            with pytest.raises(CheckpointError, match="another process"):
                convert(floats, tmp_path / "out", "int4")
            raise Stop

    with pytest.raises(Stop):
        convert(floats, tmp_path / "out", "int4", progress=second)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_stream import convert, journals
journals._SECONDS = 0.0
def slow(name, done, total):
    print(name, flush=True)
    time.sleep(0.05)
convert(Path({floats!r}), Path({out!r}), "int4", progress=slow)
"""


def test_a_killed_process_leaves_work_that_goes_on(tmp_path, floats):
    """kill -9 in the middle: no time to say anything."""
    script = KILLED.format(tests=str(Path(__file__).parent), floats=str(floats), out=str(tmp_path / "out"))
    source = Path(lowp.__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "experts.up":
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    time.sleep(0.1)
    entries = (work_directory(tmp_path / "out") / journals.JOURNAL).read_text().splitlines()
    assert len(entries) > 1 and "experts.up" not in entries[-1]
    convert(floats, tmp_path / "out", "int4")
    convert(floats, tmp_path / "whole", "int4")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# -- bad input --------------------------------------------------------------------------------------------------------


def test_non_finite_weights_are_counted_over_the_whole_tensor(tmp_path, small_slabs):
    model = model_of()
    with torch.no_grad():
        model["first"].weight[3, 5] = torch.nan
        model["first"].weight[300, 5:7] = torch.inf
    save(model, tmp_path / "floats")
    with pytest.raises(
        MisfitError, match=r"first\.weight \(384, 256\) wants finite numbers, got 1 NaN and 2 infinite of 98304"
    ):
        convert(tmp_path / "floats", tmp_path / "out", "int4")
    report = convert(tmp_path / "floats", tmp_path / "kept", {"first": None, "*": "int4"})
    assert next(row for row in report.rows if row.fqn == "first.weight").scheme is None


def test_weights_in_8_bits_are_no_input(tmp_path):
    model = model_of()
    state = {name: t.to(torch.float8_e4m3fn) if name == "first.weight" else t for name, t in model.state_dict().items()}
    holder = nn.Module()
    for name, tensor in state.items():
        holder.register_buffer(name.replace(".", "_"), tensor)
    stored = shards.read_directory(save(holder, tmp_path / "floats"))
    sources = {"first.weight": Source(shape=(384, 256), pieces=(stored["first_weight"],))}
    with pytest.raises(QuantizedError, match="wants a float of 16 bits or more, got float8_e4m3fn"):
        quantize_files(sources, lowp.plan(model, "int4"), tmp_path / "out", tied={})


def test_no_space_left_is_found_first_and_leaves_nothing(tmp_path, floats, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CheckpointError, match="of space"):
        convert(floats, tmp_path / "out", "int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["floats"]


def test_no_space_left_in_the_middle_keeps_the_work(tmp_path, floats, monkeypatch):
    write, count = stream._write, []

    def full(file, offset, tensor):
        count.append(offset)
        if len(count) == 4:
            raise OSError(28, "No space left on device")
        write(file, offset, tensor)

    monkeypatch.setattr(stream, "_write", full)
    with pytest.raises(OSError, match="No space"):
        convert(floats, tmp_path / "out", "int4")
    convert(floats, tmp_path / "out", "int4")
    convert(floats, tmp_path / "whole", "int4")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_journal_is_json_lines(tmp_path, floats):
    with pytest.raises(Stop):
        convert(floats, tmp_path / "out", "int4", progress=stop_at("head.bias"))
    lines = (work_directory(tmp_path / "out") / journals.JOURNAL).read_text().splitlines()
    assert set(json.loads(lines[0])) == {"job"}
    assert all(set(json.loads(line)) == {"done", "noise", "signal"} for line in lines[1:])
