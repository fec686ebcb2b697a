"""lowp: PyTorch models in few bits, from training to serving.

>>> import torch, lowp
>>> model = torch.nn.Sequential(torch.nn.Linear(256, 256)).bfloat16()
>>> report = lowp.quantize_(model, {"*": lowp.INT4}, method="hqq")
>>> model[0].weight.scheme
'int4/1x128*bf16'
"""

from typing import Any

from . import methods as _methods  # noqa: F401  (registers the methods)
from .errors import LowpError
from .integrations import load
from .numerics import PRESETS as _PRESETS
from .ops import explain, strict
from .quantize import dequantize_, plan, quantize_
from .quantize.checkpoint import save
from .tensor import QTensor

# The presets, each a spelling: lowp.INT4 == "int4/1x128*bf16". They come from the rows of numerics/formats.
globals().update(_PRESETS)


_ROOMS = ("optim", "qat", "train")  # read when they are asked for


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lowp")
    if name in _ROOMS:
        from importlib import import_module

        return import_module(f"lowp.{name}")
    raise AttributeError(f"module 'lowp' has no attribute {name!r}")


__all__ = ["LowpError", "QTensor", "dequantize_", "explain", "load", "plan", "quantize_", "save", "strict", *_PRESETS]
