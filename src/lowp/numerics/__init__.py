"""Floor 0: numbers. Elements, formats and block math; torch only, pure functions.

    value = (qdata - zero_point) * scale

`Element` is one scalar number format (a table of at most 256 values), `Format` adds how many elements share a scale and how
that scale is stored, `quantize` and `dequantize` go between floats and `Parts`.
"""

from .element import Element
from .format import Format, Scheme, known_formats
from .formats import ELEMENTS, PRESETS
from .known import Known
from .math import RULES, dequantize, fake_quantize, quantize
from .parts import Parts

__all__ = [
    "ELEMENTS",
    "PRESETS",
    "RULES",
    "Element",
    "Format",
    "Known",
    "Parts",
    "Scheme",
    "dequantize",
    "fake_quantize",
    "known_formats",
    "quantize",
]
