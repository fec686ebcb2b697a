"""Turning the redirect on and off: in this process, and in every process of an environment.

    install()      `import torchao` finds lowp from here on; refuses where the real torchao is imported already
    uninstall()    as it was
    enable()       two small files in site-packages: every process of the environment starts with it
    disable()      removes them
    status()       one sentence

While the redirect stands, classes say the module that torchao's say (`Int8Tensor.__module__ == "torchao.quantization"`):
hosts look at that string.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import shutil
import sys
import sysconfig
from pathlib import Path

from ..errors import LowpError
from . import library, modules, names, redirect

PTH, COPY = "_lowp_torchao.pth", "_lowp_torchao.py"
_PUBLIC = {  # where torchao's classes say that they are, other than the module that defines them
    "quantization.quantize_.workflows": "quantization",
}
_before: dict[type, str] = {}


def install() -> None:
    """Let `import torchao` find lowp in this process.

    Raises:
        LowpError: the real torchao is imported already: two of them in one process would not know each other's tensors.
    """
    real = sys.modules.get("torchao")
    if real is not None and real is not sys.modules[modules.OURS]:
        where = getattr(real, "__file__", None) or "somewhere"
        raise LowpError(
            f"torchao is imported already, from {where}: call lowp.torchao.install() before anything imports it "
            "(transformers and others do), or start the program with `python -m lowp.torchao`."
        )
    importlib.invalidate_caches()
    redirect.stand_in()
    rename()


def uninstall() -> None:
    """Take the redirect back: modules imported from here on are the real torchao's, if there is one."""
    standing = redirect.standing()
    if standing is not None:
        sys.meta_path.remove(standing)
    ours = sys.modules[modules.OURS]
    if sys.modules.get("torchao") is ours:
        for name in [name for name in sys.modules if name == "torchao" or name.startswith("torchao.")]:
            del sys.modules[name]
    for kind, module in _before.items():
        kind.__module__ = module
    _before.clear()
    library.undefine()


def installed() -> bool:
    """Whether `import torchao` finds lowp in this process."""
    return redirect.standing() is not None


def rename() -> None:
    """Let our classes say torchao's modules, and torch have torchao's operators."""
    if _before:
        return
    library.define()
    for row in names.table():
        found = modules.resolve(row) if row.works else None
        if isinstance(found, type) and found.__module__.startswith(f"{modules.OURS}.") and found not in _before:
            _before[found] = found.__module__
            place = next(
                (new for old, new in _PUBLIC.items() if row.modules[0].startswith(old) and new in row.modules),
                row.modules[0],
            )
            found.__module__ = "torchao" if place == "." else f"torchao.{place}"


# -- every process of an environment ----------------------------------------------------------------------------------------


def site_packages() -> Path:
    """Where this environment keeps its packages."""
    return Path(sysconfig.get_path("purelib"))


def enable(folder: Path | None = None) -> str:
    """Redirect `import torchao` in every process of this environment from now on; reversible by `disable`.

    Returns:
        One sentence: what was written.
    """
    place = folder or site_packages()
    shutil.copyfile(redirect.__file__, place / COPY)
    (place / PTH).write_text("import _lowp_torchao; _lowp_torchao.stand_in()\n", encoding="utf-8")
    return f"`import torchao` finds lowp in every process of this environment: wrote {PTH} and {COPY} to {place}."


def disable(folder: Path | None = None) -> str:
    """Undo `enable`.

    Returns:
        One sentence: what was removed.
    """
    place = folder or site_packages()
    gone = [name for name in (PTH, COPY) if (place / name).exists()]
    for name in gone:
        (place / name).unlink()
    return (
        f"removed {' and '.join(gone)} from {place}." if gone else f"nothing to undo: {place} has no redirect of ours."
    )


def status(folder: Path | None = None) -> str:
    """Whether this environment redirects, and whether a real torchao is there too."""
    place = folder or site_packages()
    real = importlib.machinery.PathFinder.find_spec("torchao", [path for path in sys.path if path])
    beside = f"a real torchao is installed in {real.origin}" if real is not None else "no real torchao is installed"
    on = (place / PTH).exists()
    return f"{'on' if on else 'off'}: `import torchao` finds {'lowp' if on else 'the real one'} in new processes; {beside}."
