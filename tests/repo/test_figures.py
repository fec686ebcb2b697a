"""Every row of benchmarks/results says where it is from, and what README and the pages quote stands in a row.

A figure is compared with the row to as many places as the page gives. GPU figures are the newest rows; with the CPU's, which are
measured again more often, any row will do. `QUOTED` names the sentences: one that is rewritten is missed, not passed over.
"""

import csv
import datetime
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
SPELLED = {
    "int4": "int4/1x128*bf16",
    "int8": "int8/row",
    "mxfp4": "e2m1/1x32*e8m0",
    "nvfp4": "e2m1/1x16*e4m3/tensor",
    "fp8_dynamic": "e4m3/row@e4m3/row",
    "int8_dynamic": "int8/row@int8/row",
}


def rows_of(topic, **given):
    with (ROOT / "benchmarks" / "results" / f"{topic}.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in given.items())]


def figures(topic, column="value", invert=False, **given):
    """Of the rows that answer `given`, oldest first."""
    found = [float(row[column]) for row in rows_of(topic, **given)]
    assert found, f"{topic}.csv has no row {given}"
    return [1 / one for one in found] if invert else found


def stands(quoted, found):
    """Whether a quoted figure is one of those found, to the places that it is given with."""
    places = len(quoted.partition(".")[2])
    return any(abs(float(quoted) - one) <= 0.5 * 10**-places * (1 + 1e-6) for one in found)


def page(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_row_says_where_and_when(path):
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            assert None not in row and None not in row.values(), f"{path.name}:{line}: other columns than the header"
            assert row["what"] and row["unit"] and row["device"] and row["torch"], f"{path.name}:{line}: {row}"
            assert re.fullmatch(r"[0-9a-f]{7,40}\+?", row["commit"]), f"{path.name}:{line}: commit {row['commit']!r}"
            datetime.date.fromisoformat(row["date"])
            float(row["value"])


def test_a_figure_is_compared_to_its_own_places():
    assert stands("1.58", [1.57629]) and not stands("1.57", [1.57629]) and stands("24", [23.9765])


def test_the_table_of_a_layer_on_a_gpu_is_the_newest_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"\| scheme \| 1 token \| 16 [^\n]*\n\|[- |]+\n((?:\|[^\n]*\n)+)", text).group(1).splitlines()
    assert len(table) == 7
    for line in table:
        scheme, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
        for tokens, cell in zip(("1", "16", "64", "256", "1024", "4096"), cells, strict=True):
            given = {"device": "NVIDIA H200", "scheme": SPELLED.get(scheme, scheme), "M": tokens}
            newest = figures("linear_gpu", "ratio", True, N="28672", K="4096", **given)[-1]
            assert stands(cell, [newest]), f"{scheme}, {tokens} tokens: README {cell}, row {newest}"


def test_the_table_of_a_layer_on_a_cpu_stands_in_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\S+)` against ([^|]+?) \|([^\n]+)\|$", text, re.MULTILINE)
    assert len(table) == 14
    peers = {"oneDNN, prepacked": "onednn qlinear"}
    for scheme, peer, cells in table:
        for case, cell in zip(
            ("decode 1 thread", "decode 2 threads", "512 tokens 1 thread"), cells.split("|"), strict=True
        ):
            if cell.strip():
                what = f"{scheme} 4096x4096 {case} against {peers.get(peer, peer)}"
                assert stands(cell.strip(), figures("linear_cpu", "ratio", True, what=what)), f"{what}: {cell}"


def trained(what):
    return lambda: figures("training_gpu", what=f"{what} compiled", unit="times bf16 compiled")[-1:]


def memory(what):
    return lambda: figures("training_gpu", "ratio", what=f"{what} peak memory")[-1:]


def stepped(what, column="ratio", invert=True, parameters="24 of 4096x14336"):
    return lambda: figures("optim_gpu", column, invert, what=what, parameters=parameters)[-1:]


def learned(what, scheme, column="ratio", invert=False):
    given = {"what": what, "scheme": scheme, "device": "NVIDIA H200"}
    return lambda: figures("qat", column, invert, **given)[-1:]


def loaded(what, commit, scheme="int4/1x32*bf16", column="value"):
    return lambda: figures("inference_cpu", column, what=what, scheme=scheme, commit=commit)


def decoded(scheme, column, what="decode, batch 1", commit="4ca9aee"):
    given = {"what": what, "scheme": SPELLED[scheme], "commit": commit, "fused": "True"}
    return lambda: figures("inference_gpu", column, column == "ratio" and what.startswith("decode"), **given)


def experts(column="value", invert=False, what="experts rowwise eager"):
    return lambda: figures("training_gpu", column, invert, what=what, unit="ms")


F = r"([0-9][0-9.]*[0-9]|[0-9])"
OFFLOAD, LAYERS = "24 of 4096x14336, 4096 tokens", "forward, backward and step"
BOTH = "int4/1x128*bf16@int8/row"


def median(scheme, tokens):
    """Of times bf16's speed, the newest row of each layer of at least 4096 rows."""
    rows = rows_of("linear_gpu", device="NVIDIA H200", scheme=SPELLED[scheme], M=tokens)
    newest = {(row["N"], row["K"]): 1 / float(row["ratio"]) for row in rows if int(row["N"]) >= 4096}
    return lambda: [statistics.median(newest.values())]


def recovered(scheme):
    shares = figures("qat", what="recovered share of rounding's perplexity", scheme=scheme, method="QAT")
    return lambda: [100 * share for share in shares]


def offload(what):
    fused = figures("optim_gpu", what=f"torch AdamW fused, bf16 states: {LAYERS}", parameters=OFFLOAD)[-1]
    return lambda: [fused / one for one in figures("optim_gpu", what=f"{what}: {LAYERS}", parameters=OFFLOAD)]


QUOTED = (
    ("README.md", rf"70B's layers; 8B's \| {F}; {F} \| {F}; {F} \|",
     (trained("70B tensorwise"), trained("8B tensorwise"), memory("70B tensorwise compiled"), memory("8B tensorwise compiled"))),
    ("README.md", rf"`float8_rowwise`, 70B's; 8B's \| {F}; {F} \|", (trained("70B rowwise"), trained("8B rowwise"))),
    ("README.md", rf"`int8`, 70B's \| {F} \| {F} \|", (trained("70B int8"), memory("70B int8 compiled"))),
    ("README.md", rf"131,072 tokens, eager \| {F} \| {F} \|", (experts("ratio", True), memory("experts rowwise eager"))),
    ("README.md", rf"`AdamWFp8` \| {F}; {F}; {F} \|", (stepped("AdamW8bit"), stepped("AdamW4bit"), stepped("AdamWFp8"))),
    ("README.md", rf"with `CPUOffloadOptimizer` \| {F} \| {F} \|",
     (offload("CPUOffloadOptimizer"), stepped("CPUOffloadOptimizer: peak memory", "ratio", False, OFFLOAD))),
    ("README.md", rf"`offload_gradients=True` \| {F} \|", (offload("CPUOffloadOptimizer, gradients too"),)),
    ("README.md", rf"with int8 activations \| {F}; {F} \| {F}; {F} \|",
     (learned("training step", "int4/1x128*bf16", invert=True), learned("training step", BOTH, invert=True),
      learned("peak memory of a step", "int4/1x128*bf16"), learned("peak memory of a step", BOTH))),
    ("README.md", ", ".join([F, F, F]).join(["`int4` ", "; `int8` ", "; `mxfp4` ", "; `nvfp4` ", "; the smallest"]),
     tuple(median(name, tokens) for name in ("int4", "int8", "mxfp4", "nvfp4") for tokens in ("256", "1024", "4096"))),
    ("README.md", rf"is the one to choose: {F}, {F}, {F}\.", tuple(median("fp8_dynamic", n) for n in ("256", "1024", "4096"))),
    ("README.md", rf"recovers {F} % .* loses and {F} % at 3 bits, .* \({F} % at 2",
     tuple(recovered(one) for one in ("int4/1x32*bf16@int8/row", "int3/1x32*bf16+bf16", "int2/1x32*bf16+bf16"))),
    ("docs/guide.md", rf"takes {F} ms, {F} with gradients, where everything on the GPU takes {F} and copies .{{1,30}} {F};",
     tuple(stepped(f"{what}: {LAYERS}", "value", False, OFFLOAD) for what in (
         "CPUOffloadOptimizer", "CPUOffloadOptimizer, gradients too", "torch AdamW fused, bf16 states",
         "offload, copies one after the other"))),
    ("README.md", rf"blocks takes {F} s for 128",
     (lambda: figures("calibration", "seconds", what="llama3-8b, 3 of 32 layers, sequential: minutes"),)),
    ("README.md", rf"without \({F}\)", (learned("LoRA + QAT step against full QAT", "int4/1x128*bf16 + LoRA", "value"),)),
    ("README.md", rf"at 1.38 \({F}\); `AdamW8bit` in 4.4 ms \({F}\)",
     (trained("70B rowwise_gw_hp"), stepped("AdamW8bit", "value", False))),
    ("README.md", rf"{F} ms a token where bf16 takes {F}, in {F} of its memory",
     (loaded("decode, batch 1", "694930c"), loaded("decode, batch 1", "694930c", "bf16"),
      loaded("resident memory", "694930c", column="ratio"))),
    ("README.md", rf"{F} ms where bf16 takes {F}\.",
     (loaded("decode, batch 1", "7e6d216"), loaded("decode, batch 1", "7e6d216", "bf16"))),
    *(("README.md", rf"\| `{name}` \| {F} \| {F} \| {F} \| {F} \| (?=\||Wanted)",
       (decoded(name, "value"), decoded(name, "ratio"), decoded(name, "value", "prefill"), decoded(name, "ratio", "weights")))
      for name in ("int4", "mxfp4", "fp8_dynamic")),
    ("README.md", rf"`int4` had {F} times bf16's speed, `mxfp4` {F}, `nvfp4` {F}, `fp8_dynamic` {F} and `int8` {F}\.",
     tuple(decoded(n, "ratio", commit="4906b5f") for n in ("int4", "mxfp4", "nvfp4", "fp8_dynamic", "int8"))),
    ("docs/guide.md", rf"layers {F} times as fast by `float8_tensorwise`, {F} by `float8_rowwise`, {F} by `int8`, {F} by",
     (trained("70B tensorwise"), trained("70B rowwise"), trained("70B int8"), trained("70B rowwise_gw_hp"))),
    ("docs/guide.md", rf"Llama-3-8B's {F} and {F} by the first two", (trained("8B tensorwise"), trained("8B rowwise"))),
    ("docs/guide.md", rf"tokens take {F} ms forward and backward by `float8_rowwise`, {F} ms in bf16",
     (experts(), experts("baseline"))),
    ("docs/guide.md", rf"step in {F} ms \(8 bits\), {F} \(4 bits\) and {F} \(float8\) where .{{10,60}} takes {F}\.",
     (stepped("AdamW8bit", "value", False), stepped("AdamW4bit", "value", False), stepped("AdamWFp8", "value", False),
      stepped("AdamW8bit", "baseline", False))),
    ("docs/guide.md", rf"three of 32 blocks of Llama-3-8B's shape take {F} s",
     (lambda: figures("calibration", "seconds", what="llama3-8b, 3 of 32 layers, sequential: minutes"),)),
    ("docs/performance.md", rf"LoRA of rank 16 \| {F} ms \| {F} \|",
     tuple(learned("training step", "int4/1x128*bf16 + LoRA", column) for column in ("value", "ratio"))),
    ("docs/performance.md", rf"with adapters is {F} times as fast",
     (learned("LoRA + QAT step against full QAT", "int4/1x128*bf16 + LoRA", "value"),)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sentence", "found"), QUOTED, ids=lambda one: one[-40:] if isinstance(one, str) else ""
)
def test_what_a_page_quotes_stands_in_a_row(name, sentence, found):
    quoted = re.search(sentence, page(name))
    assert quoted, f"{name} says nothing like: {sentence}"
    for cell, rows in zip(quoted.groups(), found, strict=True):
        assert stands(cell, rows()), f"{name}: {quoted.group(0)}: {cell}, rows {rows()}"
