"""The tables of elements and known formats, found by listing this folder.

A file here is a family: it defines `ELEMENTS`, the scalar formats it brings, and `KNOWN`, spellings worth knowing. Adding a
number format is adding a row; tests, docs, the CLI and the benchmark find it here.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..element import Element
from ..known import Known

_FAMILIES = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]

ELEMENTS: dict[str, Element] = {e.name: e for family in _FAMILIES for e in getattr(family, "ELEMENTS", ())}
KNOWN: tuple[Known, ...] = tuple(known for family in _FAMILIES for known in getattr(family, "KNOWN", ()))
PRESETS: dict[str, str] = {known.preset: known.spelling for known in KNOWN if known.preset}
