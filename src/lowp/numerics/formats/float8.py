"""Float8: e4m3 for weights and activations, e5m2 for gradients, their "fnuz" forms, and e8m0, the power-of-two scale.

    e4m3  bias 7,  largest 448   = 1.75 * 2**8,  NaN, no infinity      (torch.float8_e4m3fn)
    e5m2  bias 15, largest 57344 = 1.75 * 2**15, NaN and infinity      (torch.float8_e5m2)
    e8m0  2**(code - 127), code 255 is NaN; no sign, no zero           (torch.float8_e8m0fnu)

Source: OFP8 section 5.1; OCP MX v1.0 section 5.4.1 (e8m0); Noune et al., arXiv 2206.02915 (fnuz).
"""

import torch

from ..element import Element
from ..known import Known

_OFP8 = "OCP 8-bit Floating Point Specification, section 5.1"
_FNUZ = "Noune et al., arXiv 2206.02915, section 3"

ELEMENTS = (
    Element(name="e4m3", bits=8, kind="float", ebits=4, mbits=3, bias=7, specials="fn", native=torch.float8_e4m3fn, source=_OFP8),
    Element(name="e5m2", bits=8, kind="float", ebits=5, mbits=2, bias=15, specials="ieee", native=torch.float8_e5m2, source=_OFP8),
    Element(name="e4m3fnuz", bits=8, kind="float", ebits=4, mbits=3, bias=8, specials="fnuz", native=torch.float8_e4m3fnuz, source=_FNUZ),
    Element(name="e5m2fnuz", bits=8, kind="float", ebits=5, mbits=2, bias=16, specials="fnuz", native=torch.float8_e5m2fnuz, source=_FNUZ),
    Element(
        name="e8m0", bits=8, kind="float", ebits=8, mbits=0, bias=127, signed=False, specials="nan", native=torch.float8_e8m0fnu, ties="up",
        source="OCP MX v1.0, section 5.4.1",
    ),
)  # fmt: skip


KNOWN = (
    Known(spelling="e4m3/row", preset="FP8", about="weight-only float8"),
    Known(
        spelling="e4m3/row@e4m3/row",
        preset="FP8_DYNAMIC",
        about="float8 weights and per-token activations",
        source="torch._scaled_mm",
    ),
    Known(spelling="e4m3/tensor@e4m3/tensor", about="one scale each", source="Micikevicius et al., arXiv 2209.05433"),
    Known(
        spelling="e4m3/128x128@e4m3/1x128",
        preset="FP8_BLOCK",
        about="DeepSeek's block float8",
        source="DeepSeek-V3, arXiv 2412.19437, section 3.3",
    ),
    Known(spelling="e5m2/row", about="more range, less precision", source=_OFP8),
    Known(spelling="e4m3fnuz/row", about="MI300's float8", source=_FNUZ),
)
