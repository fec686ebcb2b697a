"""Spellings worth knowing: the presets, the rows of the format table in the docs, and the cases of every property test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Known:
    """One known scheme.

    Args:
        spelling: the format or scheme.
        preset: the name of the constant `lowp.NAME` that holds it, such as "INT8"; "" for none.
        about: what it is used for, in a line.
        source: paper, standard or library.
    """

    spelling: str
    preset: str = ""
    about: str = ""
    source: str = ""
