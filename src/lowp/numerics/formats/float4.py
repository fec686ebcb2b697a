"""Float4: e2m1, sixteen codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Bias 1, largest 6 = 1.5 * 2**2.

Source: OCP MX v1.0 section 5.3.3.
"""

from ..element import Element
from ..known import Known

ELEMENTS = (Element(name="e2m1", bits=4, kind="float", ebits=2, mbits=1, bias=1, source="OCP MX v1.0, section 5.3.3"),)


KNOWN = (Known(spelling="e2m1/1x64*bf16", about="float4 with a bf16 scale for each 64"),)
