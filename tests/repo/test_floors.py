"""The floors of the house: a module imports its own floor or a lower one, read off the syntax tree of every file.

    6 edges    integrations torchao cli report   and the package's own face, lowp/__init__.py
    5 uses     methods qat train optim sparsify generate   rooms beside each other: they never import one another
    4 model    quantize
    3 tensor   tensor
    2 compute  ops kernels
    1 storage  layouts
    0 numbers  numerics, errors

Imports inside functions count, and so does import_module("...") with a constant name: a lazy import upward is still an
import upward. What a lower floor needs of a higher one it finds in a registry instead.

Other people's packages: what runs when a module is imported may name only torch, numpy and safetensors (floor 0: only
torch), and in a few places one guest more. Inside a function any guest may be imported.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "lowp"
FLOORS = [
    {"numerics", "errors"},
    {"layouts"},
    {"ops", "kernels"},
    {"tensor"},
    {"quantize"},
    {"methods", "qat", "train", "optim", "sparsify", "generate"},
    {"integrations", "torchao", "cli", "report", "__init__", "__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
APART = FLOORS[5]
GUESTS = {"kernels/triton_": {"triton"}, "cli": {"typer", "rich"}}  # folder or file stem: what it may import at once


def targets(node: ast.AST, package: str, source: Path) -> list[str]:
    """The absolute names of the modules that one node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        here = package.split(".")
        parents = here[: len(here) + 1 - node.level] if node.level else []
        base = ".".join(parents + ([node.module] if node.module else []))
        if base != "lowp":
            return [base]
        rooms = {entry.name.removesuffix(".py") for entry in source.iterdir()}
        return [f"lowp.{alias.name}" if alias.name in rooms else base for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        name = node.args[0].value
        if called in {"import_module", "__import__"} and isinstance(name, str):
            return [package + name if name.startswith(".") else name]
    return []


def run_at_once(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, nothing under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            child = ast.Module(child.orelse, [])
        yield child
        yield from run_at_once(child)


def allowed_at_once(inside: Path) -> set[str]:
    base = {"lowp", "torch"} | sys.stdlib_module_names
    if inside.parts[0] == "numerics":
        return base
    guests = [names for place, names in GUESTS.items() if inside.with_suffix("").is_relative_to(place)]
    return base.union({"numpy", "safetensors"}, *guests)


def complaints(path: Path, source: Path) -> list[str]:
    inside = path.relative_to(source)
    package = ".".join(["lowp", *inside.parent.parts])
    here = inside.parts[0].removesuffix(".py")
    if here not in FLOOR_OF:
        return [f"{inside}: {here} is on no floor: give it one in FLOORS"]
    floor, tree, found = FLOOR_OF[here], ast.parse(path.read_text(encoding="utf-8"), str(path)), []

    def say(node: ast.AST, what: str) -> None:
        found.append(f"{inside}:{node.lineno}: {what}")

    for node in ast.walk(tree):
        for module in targets(node, package, source):
            if module.split(".")[0] != "lowp":
                continue
            there = (module.split(".") + ["__init__"])[1]
            if there not in FLOOR_OF:
                say(node, f"{module} is on no floor: give it one in FLOORS")
            elif FLOOR_OF[there] > floor:
                say(node, f"{module} is on floor {FLOOR_OF[there]}, this is floor {floor}: find it through a registry")
            elif here != there and {here, there} <= APART:
                say(node, f"{here} and {there} are rooms beside each other: move what both use one floor down")
    for node in run_at_once(tree):
        for module in targets(node, package, source):
            if module.split(".")[0] not in allowed_at_once(inside):
                say(node, f"{module} is a guest: import it inside the function that uses it")
    if floor <= 2:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "Module" and "nn" in ast.unparse(node.value).split("."):
                say(node, "floors 0 to 2 know no nn.Module")
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b).split(".")[-1] == "Tensor" for b in node.bases):
                say(node, "floors 0 to 2 know no tensor subclass")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_downward(path: Path):
    found = complaints(path, SOURCE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("ops/a.py", "from lowp.tensor import QTensor", "floor 3, this is floor 2"),
        ("ops/a.py", "def f():\n    from ..quantize import apply", "floor 4, this is floor 2"),
        ("ops/a.py", "import importlib\nimportlib.import_module('lowp.cli')", "floor 6, this is floor 2"),
        ("layouts/a.py", "import lowp", "floor 6, this is floor 1"),
        ("layouts/a.py", "from lowp import ops", "floor 2, this is floor 1"),
        ("qat/deep/a.py", "from ...train import recipes", "rooms beside each other"),
        ("ops/a.py", "from lowp.helpers import x", "lowp.helpers is on no floor"),
        ("helpers.py", "", "helpers is on no floor"),
        ("numerics/a.py", "import numpy", "numpy is a guest"),
        ("quantize/a.py", "try:\n    import transformers\nexcept ImportError:\n    pass", "transformers is a guest"),
        ("kernels/torch_/a.py", "import triton", "triton is a guest"),
        ("kernels/a.py", "class A:\n    import triton.language as tl", "triton.language is a guest"),
        ("ops/a.py", "from torch import nn\ndef f(m: nn.Module): ...", "no nn.Module"),
        ("layouts/a.py", "import torch\nclass A(torch.Tensor): ...", "no tensor subclass"),
    ],
)
def test_a_broken_rule_is_seen(tmp_path: Path, name: str, text: str, said: str):
    assert any(said in line for line in plant(tmp_path, name, text))


@pytest.mark.parametrize(
    "name, text",
    [
        ("kernels/triton_/a.py", "import triton"),
        ("cli/a.py", "import typer, rich\nfrom lowp import quantize_, report"),
        ("quantize/a.py", "def f():\n    import transformers"),
        ("ops/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        ("ops/a.py", "from ..layouts import base\nfrom . import registry\nfrom lowp import errors, numerics"),
        ("qat/a.py", "from .fake import x\nfrom lowp.quantize import apply"),
    ],
)
def test_a_kept_rule_is_left_alone(tmp_path: Path, name: str, text: str):
    assert plant(tmp_path, name, text) == []


def plant(source: Path, name: str, text: str) -> list[str]:
    for room in FLOOR_OF:
        (source / room).mkdir()
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text(text)
    return complaints(source / name, source)
