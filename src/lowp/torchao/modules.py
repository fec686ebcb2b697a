"""torchao's modules, made from the table of names: `lowp.torchao.quantization` is no file but rows of `names/`.

A finder on sys.meta_path answers `lowp.torchao.*`, and, where the redirect was asked for (`redirect.py`), `torchao.*` with the
same module objects, so that `torchao.x is lowp.torchao.x`. An object is looked up in its file when it is first asked for.

A name that is a function and a package at once (`quantization.quantize_`) stays the function: the import system's attempt to bind
the package over it is not heard. `import torchao.quantization.quantize_.common` finds the package in sys.modules all the same.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from . import names

OURS = __package__  # "lowp.torchao"
_DEPTH = 10  # frames between a finder and `from module import name`


class Module(ModuleType):
    """A module whose contents are rows of the table."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{OURS}.{path}", f"torchao.{path}, as lowp has it: see {names.DOCS}.")
        self.__dict__["_path"] = path
        self.__dict__["__path__"] = []  # a package: an unknown name in `from ... import` then comes to the finder
        rows = names.by_module()[path]
        self.__dict__["__all__"] = [name for name, row in rows.items() if row.works and name[0] != "_"]

    def __getattr__(self, name: str) -> Any:
        path = self.__dict__["_path"]
        row = names.by_module()[path].get(name)
        if row is not None and row.works:
            self.__dict__[name] = found = resolve(row)
            return found
        if name in names.submodules(path):
            return importlib.import_module(f"{self.__name__}.{name}")
        if name.startswith(
            "__"
        ):  # asked of every module by inspect; a search for the nearest name would cost each of them
            raise AttributeError(name)
        raise AttributeError(names.sentence(path, name))

    def __setattr__(self, name: str, value: Any) -> None:
        row = names.by_module()[self._path].get(name)
        if isinstance(value, ModuleType) and row is not None and row.works:
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        rows = names.by_module()[self._path]
        return sorted({*self.__dict__, *(n for n, row in rows.items() if row.works), *names.submodules(self._path)})


def resolve(row: names.Name) -> Any:
    """The object of a row."""
    file, _, name = row.ours.partition(":")
    return getattr(importlib.import_module(f"{OURS}.{file}"), name)


class _Loader(importlib.abc.Loader):
    """Hands out one module object for each path, under whichever name it is asked for."""

    def __init__(self, path: str) -> None:
        self.path = path

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        name = f"{OURS}.{self.path}" if self.path else OURS
        return sys.modules.get(name) or Module(self.path)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run. The import system wrote the alias's spec into the module: put its own back."""
        name = f"{OURS}.{self.path}" if self.path else OURS
        module.__name__ = name
        if self.path:
            module.__spec__ = spec_of(name, self.path)
            module.__loader__, module.__package__ = module.__spec__.loader, name
            sys.modules.setdefault(name, module)
        else:
            module.__spec__ = _ROOT_SPEC


_ROOT_SPEC = sys.modules[OURS].__spec__


def spec_of(fullname: str, path: str) -> importlib.machinery.ModuleSpec:
    """The spec of a module of the table, under one of its names."""
    spec = importlib.machinery.ModuleSpec(fullname, _Loader(path), origin=f"lowp: {names.DOCS}", is_package=True)
    spec.submodule_search_locations = []
    return spec


class Finder(importlib.abc.MetaPathFinder):
    """Answers `<prefix>.*` from the table."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of the table; a name that `from ... import` looks for and does not find is a sentence."""
        if not fullname.startswith(f"{self.prefix}."):
            return None
        inside = fullname[len(self.prefix) + 1 :]
        if inside in names.by_module():
            return spec_of(fullname, inside)
        parent, _, name = inside.rpartition(".")
        if parent in names.by_module() and _is_from_import():
            raise ImportError(names.sentence(parent, name), name=fullname)
        return None


def _is_from_import() -> bool:
    frame: Any = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if frame.f_code.co_name == "_handle_fromlist":
            return True
        frame = frame.f_back
    return False


def serve() -> None:
    """Let `lowp.torchao.*` be imported."""
    if not any(isinstance(finder, Finder) and finder.prefix == OURS for finder in sys.meta_path):
        sys.meta_path.append(Finder(OURS))
