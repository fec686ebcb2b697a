"""The redirect of `import torchao` to lowp: a finder that needs nothing but Python, so that it can stand in every process of an
environment without importing torch there.

    find_spec            torchao and torchao.* -> the modules of lowp.torchao; lowp is imported at the first of them
    find_distributions   importlib.metadata's version("torchao") and metadata("torchao") -> 0.18.0

`lowp torchao enable` copies this file into site-packages beside a .pth file that calls `stand_in()` when Python starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

VERSION = "0.18.0"
METADATA = f"""Metadata-Version: 2.1
Name: torchao
Version: {VERSION}
Summary: lowp answers for torchao here: the names are torchao's, what runs is lowp
Requires-Python: >=3.10
License: BSD-3-Clause
Provides-Extra: dev

This distribution is lowp under the name of torchao. `lowp torchao status` says how it came here.
"""


class Distribution(importlib.metadata.Distribution):
    """What importlib.metadata is told about torchao."""

    def read_text(self, filename):
        """The text of one of its files, None if it has no such file."""
        return {"METADATA": METADATA, "top_level.txt": "torchao\n", "INSTALLER": "lowp\n"}.get(filename)

    def locate_file(self, path):
        """Where a file would lie; there are none."""
        import pathlib

        return pathlib.Path(__file__).parent / path


class Redirect:
    """Answers for torchao on sys.meta_path."""

    def find_spec(self, fullname, path=None, target=None):
        """The spec of torchao or one of its modules, from the table of names."""
        if fullname != "torchao" and not fullname.startswith("torchao."):
            return None
        try:
            modules = importlib.import_module("lowp.torchao.modules")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "lowp":
                raise
            import warnings

            warnings.warn(
                "torchao is redirected to lowp, which is not installed: remove _lowp_torchao.pth.", stacklevel=2
            )
            return None
        importlib.import_module("lowp.torchao.hook").rename()
        if fullname == "torchao":
            return modules.spec_of("torchao", "")
        found = modules.Finder("torchao").find_spec(fullname, path, target)
        if found is None:
            names = importlib.import_module("lowp.torchao.names")
            parent, _, name = fullname[len("torchao.") :].rpartition(".")
            raise ModuleNotFoundError(f"No module named {fullname!r}. {names.sentence(parent, name)}", name=fullname)
        return found

    def find_distributions(self, context=None):
        """torchao's distribution, where it or every one is asked for."""
        name = getattr(context, "name", None)
        return iter([Distribution()] if name is None or name.lower() == "torchao" else [])


def standing():
    """The redirect that stands on sys.meta_path, or None."""
    return next(
        (
            finder
            for finder in sys.meta_path
            if type(finder).__name__ == "Redirect" and hasattr(finder, "find_distributions")
        ),
        None,
    )


def stand_in():
    """Put the redirect before every other finder."""
    if standing() is None:
        sys.meta_path.insert(0, Redirect())
