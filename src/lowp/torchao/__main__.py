"""python -m lowp.torchao script.py args, or python -m lowp.torchao -m module args: run it with `import torchao` finding lowp."""

import os
import runpy
import sys

from .hook import install

USAGE = "usage: python -m lowp.torchao [-m MODULE | SCRIPT] [ARGUMENTS]"


def main() -> None:
    """Run a script or a module, as Python itself would."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        sys.exit(USAGE)
    if arguments[0] != "-m" and not os.path.exists(arguments[0]):
        sys.exit(
            f"python -m lowp.torchao wants a script or -m MODULE, got {arguments[0]!r}, which is no file here.\n{USAGE}"
        )
    install()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
