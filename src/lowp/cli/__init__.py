"""Floor 6: the command line, `lowp VERB ...`.

A verb is one file in this folder. It defines `COMMANDS`, a dict from the verb's name to a function whose parameters are typer
arguments and options; `app.py` finds it by listing the folder, and answers errors, `--debug` and Ctrl-C for all of them.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line (the script `lowp` that pip installs)."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"lowp: the command line wants the package {error.name}: pip install 'lowp[cli]'\n")
        sys.exit(2)
    from .app import build

    build()()


__all__ = ["main"]
