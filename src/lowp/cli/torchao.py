"""lowp torchao: let `import torchao` find lowp in every process of this environment, or no longer."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import SpellingError
from ..torchao import hook
from .app import Json, print_json, show

_ACTIONS = {"enable": hook.enable, "disable": hook.disable, "status": hook.status}
Action = Annotated[str, typer.Argument(metavar="enable|disable|status", show_default=False, help="What to do.")]


def torchao(action: Action, json: Json = False) -> None:
    """Redirect `import torchao` to lowp in this environment, undo it, or say how it stands.

    For one program, `python -m lowp.torchao script.py` does without.
    """
    if action not in _ACTIONS:
        raise SpellingError.of("action", action, _ACTIONS)
    said = _ACTIONS[action]()
    print_json({"action": action, "said": said}) if json else show(said)


COMMANDS = {"torchao": torchao}
