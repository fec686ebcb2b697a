"""Floor 1: storage. A layout moves numbers and never changes them: `unpack(pack(parts)) == parts`, bit for bit.

A layout is one file in this folder; it is found by listing the folder.
"""

from __future__ import annotations

import importlib
import pkgutil

from ..errors import SpellingError
from .base import Layout, Spec

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for info in pkgutil.iter_modules(__path__)
    for layout in getattr(importlib.import_module(f"{__name__}.{info.name}"), "LAYOUTS", ())
}


def layout_of(name: str) -> Layout:
    """The layout of that name, or a SpellingError that names the nearest."""
    if name not in LAYOUTS:
        raise SpellingError.of("layout", name, LAYOUTS)
    return LAYOUTS[name]


__all__ = ["LAYOUTS", "Layout", "Spec", "layout_of"]
