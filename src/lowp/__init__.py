"""lowp: PyTorch models in few bits, from training to serving.

>>> import lowp
>>> report = lowp.quantize_(model, {"lm_head": None, "*": lowp.INT4})
>>> print(report)
"""

from . import methods as _methods  # noqa: F401  (registers the methods)
from .errors import LowpError
from .numerics import PRESETS as _PRESETS
from .ops import explain, strict
from .quantize import dequantize_, plan, quantize_
from .tensor import QTensor

# The presets, each a spelling: lowp.INT4 == "int4/1x128*bf16". They come from the rows of numerics/formats.
globals().update(_PRESETS)


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("lowp")
    raise AttributeError(f"module 'lowp' has no attribute {name!r}")


__all__ = ["LowpError", "QTensor", "dequantize_", "explain", "plan", "quantize_", "strict", *_PRESETS]
