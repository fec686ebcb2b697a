"""Float6: e3m2 and e2m3, no infinity, no NaN: all codes are numbers.

    e2m3  bias 1, largest 7.5 = 1.875 * 2**2        e3m2  bias 3, largest 28 = 1.75 * 2**4

Source: OCP MX v1.0 section 5.3.2.
"""

from ..element import Element
from ..known import Known

_MX = "OCP MX v1.0, section 5.3.2"

ELEMENTS = (
    Element(name="e3m2", bits=6, kind="float", ebits=3, mbits=2, bias=3, source=_MX),
    Element(name="e2m3", bits=6, kind="float", ebits=2, mbits=3, bias=1, source=_MX),
)


KNOWN = (Known(spelling="e3m2/row", about="FP6-LLM's weights", source="FP6-LLM, arXiv 2401.14112"),)
