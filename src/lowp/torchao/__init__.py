"""lowp under torchao's names: whatever speaks torchao runs on lowp.

    from lowp.torchao.quantization import quantize_, Int4WeightOnlyConfig        one line changed
    python -m lowp.torchao script.py                                             none: `import torchao` finds lowp
    import lowp.torchao; lowp.torchao.install()                                  the same from inside, before others import it
    lowp torchao enable                                                          the same for every process of this environment

Configurations, tensor classes, affine primitives and checkpoints are torchao's by name, field and number (0.18); what runs is
lowp: its formats, its kernels, on every device. docs/torchao.md lists each name, its state and what differs.
Nothing is redirected unless asked.
"""

from typing import Any

from . import modules as _modules
from . import names as _names
from .hook import install, installed, uninstall

_modules.serve()
__version__ = "0.18.0"  # torchao's, whose names these are


def __getattr__(name: str) -> Any:
    row = _names.by_module()[""].get(name)
    if row is not None and row.works:
        return _modules.resolve(row)
    if name in _names.submodules(""):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(_names.sentence("", name))


__all__ = ["install", "installed", "uninstall"]
