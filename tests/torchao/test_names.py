"""The table of torchao's names: every row that works resolves, every module can be imported, every other name says what to do."""

import importlib
import re
import sys

import pytest

import lowp.torchao
from lowp.torchao import names
from lowp.torchao.modules import Module, resolve

WORKS = [row for row in names.table() if row.works]


def test_the_table_is_whole():
    seen = [(module, row.name) for row in names.table() for module in row.modules]
    assert len(seen) == len(set(seen)), sorted({entry for entry in seen if seen.count(entry) > 1})
    assert all(row.note for row in names.table() if not row.works), "what is not there says which part is missing"
    assert len(WORKS) > 150


@pytest.mark.parametrize("row", WORKS, ids=lambda row: f"{row.modules[0]}.{row.name}")
def test_what_works_is_there_under_all_its_modules(row):
    found = resolve(row)
    for module in row.modules:
        imported = importlib.import_module("lowp.torchao" if module == "." else f"lowp.torchao.{module}")
        assert getattr(imported, row.name) is found


def test_every_module_can_be_imported():
    for path in names.by_module():
        module = importlib.import_module(f"lowp.torchao.{path}" if path else "lowp.torchao")
        assert path == "" or isinstance(module, Module)


def test_a_function_and_a_package_of_one_name_stay_both():
    from lowp.torchao.quantization import quantize_
    from lowp.torchao.quantization.quantize_.common import KernelPreference
    from lowp.torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    assert callable(quantize_) and callable(lowp.torchao.quantization.quantize_)
    assert KernelPreference.AUTO == "auto" and Int8Tensor is lowp.torchao.quantization.Int8Tensor
    assert isinstance(sys.modules["lowp.torchao.quantization.quantize_"], Module)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("from lowp.torchao.quantization import Int8Tensr", r"did you mean Int8Tensor .*docs/torchao\.md"),
        ("from lowp.torchao.quantization import MXTensor", r"MXTensor is in|did you mean"),
        (
            "from lowp.torchao.prototype.parq.api import create_optimizer",
            r"not there yet: lowp lacks PARQ\. docs/torchao\.md",
        ),
        ("from lowp.torchao.prototype.parq.optim.quantopt import QuantOptimizer", r"is not there yet: lowp lacks"),
    ],
)
def test_an_unknown_name_is_a_sentence(statement, said):
    with pytest.raises(ImportError, match=said):
        exec(statement)


def test_asking_whether_a_name_is_there_raises_nothing():
    import lowp.torchao.quantization as quantization

    assert not hasattr(quantization, "Int8Tensr") and not hasattr(lowp.torchao, "nothing_of_this_name")
    with pytest.raises(AttributeError, match="did you mean Int8Tensor"):
        _ = quantization.Int8Tensr
    assert "Int8Tensor" in dir(quantization) and "Int4WeightOnlyEmbedding" not in dir(quantization.qat.embedding)


def test_star_imports_what_works():
    space: dict = {}
    exec("from lowp.torchao.quantization import *", space)
    assert {"quantize_", "Int4WeightOnlyConfig", "PerRow", "Int8Tensor"} <= set(space)


def test_the_page_is_named_in_every_sentence():
    for module, rows in names.by_module().items():
        for name in rows:
            assert re.search(r"docs/torchao\.md", names.sentence(module, name))
