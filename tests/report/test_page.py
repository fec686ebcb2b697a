"""The page holds every figure and fetches nothing; rows of results keep their columns; labels do not overlap."""

import csv
import dataclasses
import itertools
import re

import pytest
import torch

from lowp.errors import MisfitError
from lowp.quantize import ReportRow
from lowp.report import Evaluation, Quality
from lowp.report.plots import kind_of, spread
from lowp.report.results import COLUMNS, append, row


def evaluation_of(name="int4 <b>", scheme="int4/1x128*bf16", kl=0.1):
    rows = tuple(
        ReportRow(
            fqn=f"model.layers.{i}.mlp.up_proj.weight", tied=(), kind="linear", shape=(64, 128), scheme=scheme or None,
            layout="plain", kernel="dequantize", bytes_before=16384, bytes_after=4224, error=0.1 + 0.01 * i, why="rule '*'",
        )
        for i in range(3)
    )  # fmt: skip
    quality = Quality(tokens=10, perplexity=11.0, original_perplexity=10.0, kl=kl, top1=0.875)
    return Evaluation(
        name=name, scheme=scheme, bytes_before=60000, bytes_after=20000, bits=4.125, quality=quality, rows=rows,
        output_errors={"model.layers.0.mlp.up_proj": 0.05},
    )  # fmt: skip


@pytest.fixture
def page():
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from lowp.report.page import page

    return page


def test_a_page_holds_every_figure(page):
    html = page(
        [evaluation_of()], title="A & B", caption="said", facts={"text": "x.txt"}, texts={"bf16": "<i>"}, prompt="The"
    )
    for text in (
        "A &amp; B",
        "said",
        "x.txt",
        "11.000",
        "+10.00 %",
        "87.5 %",
        "3.00 ×",
        "model.layers.2.mlp.up_proj.weight",
        "&lt;i&gt;",
    ):
        assert text in html, text
    assert "<b>int4" not in html and "int4 &lt;b&gt;" in html, "names are text, not markup"


def test_a_page_fetches_nothing(page):
    html = page([evaluation_of()], title="x")
    assert not re.findall(r"<(?:script|link|iframe|img)\b|@import|url\((?!#)", html)
    assert not re.findall(r"(?:src|href)=\"(?!#)", html)


def test_plots_follow_the_page_and_share_no_ids(page):
    html = page([evaluation_of(), evaluation_of("fp8", "e4m3/row", 0.01)], title="x")
    assert html.count("<svg") == 4 and "currentColor" in html and "#010203" not in html
    ids = re.findall(r'<clipPath id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "changed", [{"kl": 0.0}, {"kl": float("inf"), "perplexity": float("inf")}, {"perplexity": 9.0}]
)
def test_figures_at_the_edge_are_drawn(page, changed):
    one = evaluation_of()
    one = dataclasses.replace(one, quality=dataclasses.replace(one.quality, **changed))
    assert "</html>" in page([one, evaluation_of("copy", "", 0.0)], title="x")


def test_nothing_to_show_is_an_error(page):
    with pytest.raises(MisfitError, match="at least one model"):
        page([], title="x")


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    from lowp.report.plots import picture

    picture([evaluation_of()], "title", "caption", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("places", [[], [5.0], [0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 50.0], [0.0, 9.0, 18.0, 19.0]])
def test_spread_keeps_order_and_distance(places):
    found = spread(places, 10.0)
    assert sorted(range(len(places)), key=lambda i: places[i]) == sorted(range(len(places)), key=lambda i: found[i])
    ordered = sorted(found)
    assert all(b - a >= 10.0 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert sum(found) == pytest.approx(sum(places))


def test_the_kind_of_a_layer():
    assert kind_of(evaluation_of().rows[0]) == "up_proj"


# -- rows of results --------------------------------------------------------------------------------------------------


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "new" / "quality.csv"
    append(path, [row("perplexity", 11.0, "1", 10.0, scheme="int4/row")])
    append(path, [row("bytes", 123456789, "B", scheme="int8/row")])
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [*COLUMNS, "scheme"]
    assert [one["ratio"] for one in found] == ["1.1", ""]
    assert found[0]["torch"] == torch.__version__ and found[0]["device"] and found[0]["date"]


def test_another_file_is_not_spoiled(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(MisfitError, match="columns"):
        append(path, [row("x", 1.0, "s")])
    assert path.read_text() == "a,b\n1,2\n"
