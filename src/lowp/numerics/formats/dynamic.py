"""Dynamic maps of 8 and 4 bits: the states of low-bit optimizers.

A dynamic map spends a moving number of bits on the exponent: for i leading zero bits the value is 10**(i - top) times a
linear fraction of the bits left. So it covers seven decades with a relative error that grows only for the smallest values.
The signed map serves Adam's first moment, the unsigned one its second.

    fractions(i) = midpoints of linspace(0.1, 1, 2**i + 1)          values = +- 10**(i - top) * fractions(i), 0 and 1

The unsigned 4-bit map is linear without zero, (1..16)/16: the second moment stands under a root in a denominator.

Sources: Dettmers et al., arXiv 2110.02861, section 2 and appendix F; Li et al., arXiv 2309.01507, section 4 (4 bits).
"""

from __future__ import annotations

from ..element import Element
from ..known import Known

_DETTMERS = "Dettmers et al., arXiv 2110.02861, appendix F"


def dynamic_map(*, signed: bool, exponent_bits: int, bits: int) -> tuple[float, ...]:
    """The sorted values of a dynamic map: 2**bits numbers."""
    values = [0.0, 1.0]
    for i in range(exponent_bits):
        count = 2 ** (i + bits - 1 - exponent_bits + (0 if signed else 1))
        step = 0.9 / count
        middles = [(0.1 + (k + 0.5) * step) * 10.0 ** (i - (exponent_bits - 1)) for k in range(count)]
        values += middles + ([-middle for middle in middles] if signed else [])
    return tuple(sorted(values))


ELEMENTS = (
    Element(
        name="dyn8",
        bits=8,
        kind="codebook",
        codebook=dynamic_map(signed=True, exponent_bits=7, bits=8),
        ties="up",
        source=_DETTMERS,
    ),
    Element(
        name="udyn8",
        bits=8,
        kind="codebook",
        codebook=dynamic_map(signed=False, exponent_bits=7, bits=8),
        signed=False,
        ties="up",
        source=_DETTMERS,
    ),
    Element(
        name="dyn4",
        bits=4,
        kind="codebook",
        codebook=dynamic_map(signed=True, exponent_bits=3, bits=4),
        ties="up",
        source="arXiv 2309.01507, section 4",
    ),
    Element(
        name="ulin4",
        bits=4,
        kind="codebook",
        codebook=tuple((i + 1) / 16 for i in range(16)),
        signed=False,
        ties="up",
        source="arXiv 2309.01507, section 4.1",
    ),
)

UNSIGNED = {"dyn8": "udyn8", "dyn4": "ulin4"}  # the map of a second moment, beside that of the first


KNOWN = (
    Known(spelling="dyn8/1x256", about="first moment of an 8-bit Adam", source=_DETTMERS),
    Known(spelling="udyn8/1x256", about="second moment of an 8-bit Adam", source=_DETTMERS),
    Known(spelling="dyn4/1x128", about="first moment of a 4-bit Adam", source="arXiv 2309.01507"),
    Known(spelling="ulin4/1x128", about="second moment of a 4-bit Adam", source="arXiv 2309.01507"),
)
