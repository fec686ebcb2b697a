"""The table of torchao's public names: where each is there, what it is here, in what state, and what differs.

One line a name, in the files `names/*.tsv`, four columns:

    modules       the modules under `torchao.` that have it, the defining one first; "." is torchao itself
    name
    ours          "file:object" in this folder; empty: not there yet
    differences   or, where it is not there yet, the part of lowp that is missing

Everything follows from it: the modules (`modules.py`), the sentence that answers an unknown name, and docs/torchao.md.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

DOCS = "docs/torchao.md"
_FOLDER = Path(__file__).parent / "names"


@dataclass(frozen=True, kw_only=True)
class Name:
    """One name of torchao's."""

    modules: tuple[str, ...]
    name: str
    ours: str
    note: str

    @property
    def works(self) -> bool:
        """Whether it is there."""
        return bool(self.ours)


@functools.cache
def table() -> tuple[Name, ...]:
    """All names, in the order of the files.

    >>> next(row for row in table() if row.name == "Int8Tensor").ours
    'tensors:Int8Tensor'
    """
    rows = []
    for path in sorted(_FOLDER.glob("*.tsv")):
        for line in path.read_text(encoding="utf-8").splitlines():
            modules, name, ours, note = line.split("\t")
            rows.append(Name(modules=tuple(modules.split()), name=name, ours=ours, note=note))
    return tuple(rows)


@functools.cache
def by_module() -> dict[str, dict[str, Name]]:
    """Module -> name -> row. Every part of a module's path is a module too; "" is torchao itself."""
    found: dict[str, dict[str, Name]] = {"": {}}
    for row in table():
        for module in row.modules:
            path = "" if module == "." else module
            found.setdefault(path, {})[row.name] = row
            while path:
                path = path.rpartition(".")[0]
                found.setdefault(path, {})
    return found


def submodules(module: str) -> list[str]:
    """The modules directly inside a module."""
    head = f"{module}." if module else ""
    return sorted(
        {
            path[len(head) :]
            for path in by_module()
            if path.startswith(head) and path != module and "." not in path[len(head) :]
        }
    )


def sentence(module: str, name: str) -> str:
    """Why a name cannot be imported, and what comes nearest.

    >>> sentence("prototype.parq.api", "create_optimizer")
    'torchao.prototype.parq.api.create_optimizer is not there yet: lowp lacks PARQ. docs/torchao.md lists what is.'
    """
    full = f"torchao.{module}" if module else "torchao"
    row = by_module().get(module, {}).get(name)
    if row is not None:
        return f"{full}.{name} is not there yet: lowp lacks {row.note}. {DOCS} lists what is."
    here = [*by_module().get(module, {}), *submodules(module)]
    near = difflib.get_close_matches(name, here, n=2, cutoff=0.6)
    elsewhere = [row for row in table() if row.name == name]
    if near:
        found = [by_module().get(module, {}).get(one) for one in near]
        lacking = {one.note for one in found if one is not None and not one.works}
        hint = f": did you mean {' or '.join(near)} of {full}?"
        hint += f" lowp lacks {' and '.join(sorted(lacking))}." if lacking else ""
    elif elsewhere:
        place = elsewhere[0].modules[0]
        hint = f": {name} is in {'torchao' if place == '.' else f'torchao.{place}'}."
        hint += "" if elsewhere[0].works else f" It is not there yet: lowp lacks {elsewhere[0].note}."
    else:
        every = difflib.get_close_matches(name, [row.name for row in table()], n=1, cutoff=0.6)
        row = next((row for row in table() if every and row.name == every[0]), None)
        hint = f": did you mean {every[0]}?" if every else "."
        hint += f" lowp lacks {row.note}." if row is not None and not row.works else ""
    return f"torchao 0.18 has no public {name} in {full}{hint} {DOCS} lists all names."
