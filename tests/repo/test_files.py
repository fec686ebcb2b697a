"""What a file looks like: it opens with a page that teaches, its examples hold, and none is a drawer for odds and ends."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "src" / "lowp"
FILES = sorted(SOURCE.rglob("*.py"))


def opens_with_a_page(text: str) -> bool:
    return text.count("\n") <= 30 or bool(ast.get_docstring(ast.parse(text)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_of_over_30_lines_opens_with_a_page(path: Path):
    opens = opens_with_a_page(path.read_text(encoding="utf-8"))
    assert opens, f"{path.name}: over 30 lines and no docstring at its top: say what, why, the equation, the source"


def test_a_missing_page_is_seen():
    assert not opens_with_a_page("x = 1\n" * 31)
    assert opens_with_a_page('"""A page."""\n' + "x = 1\n" * 31)


def test_no_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [path for path in SOURCE.rglob("*") if path.stem in drawers] == []


WITH_EXAMPLES = [path for path in FILES if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples_in_docstrings_hold(path: Path):
    """An example may use its own module's names, torch, lowp, and what its room exports (numerics/x.py: lowp.numerics)."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    given = {
        "torch": torch,
        "lowp": importlib.import_module("lowp"),
        **vars(importlib.import_module(f"lowp.{parts[0]}")),
    }
    module = importlib.import_module(".".join(["lowp", *parts]).removesuffix(".__init__"))
    result = doctest.testmod(module, globs=given | vars(module))
    assert result.attempted > 0 and result.failed == 0


def test_no_figure_names_a_folder_of_one_machine():
    folders = re.compile(r"(?<![\w.])/(tmp|home|root|work|mnt|data|Users)/")
    assert folders.search("--out /tmp/x") and not folders.search("tokens/s,1/2")
    rows = (SOURCE.parents[1] / "benchmarks" / "results").glob("*.csv")
    found = [
        f"{path.name}:{i}"
        for path in rows
        for i, row in enumerate(path.open(encoding="utf-8"), 1)
        if folders.search(row)
    ]
    assert not found, f"rows that name a folder of the machine they were measured on: {found}"
