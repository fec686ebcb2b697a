"""MX: 32 elements share one power-of-two scale of 8 bits (e8m0).

The scale of a block follows from amax, its largest magnitude, and emax = floor(log2(largest value of the element)):

    floor   2**(floor(log2(amax)) - emax)                    the standard's; the largest elements may be clamped
    ceil    2**(ceil(log2(amax)) - emax)
    even    as floor, after rounding amax to the element's mantissa
    rceil   2**ceil(log2(amax / max))                        the smallest power of two that clamps nothing: the default

Sources: OCP MX v1.0 sections 5 and 6.3; Mishra et al., arXiv 2506.08027 (rceil).
"""

from ..known import Known

_MX = "OCP MX v1.0, section 5"

KNOWN = (
    Known(spelling="e4m3/1x32*e8m0@e4m3/1x32*e8m0", preset="MXFP8", about="MXFP8 weights and activations", source=_MX),
    Known(spelling="e4m3/1x32*e8m0", about="MXFP8, weight-only", source=_MX),
    Known(spelling="e5m2/1x32*e8m0", about="MXFP8 with more range", source=_MX),
    Known(spelling="e3m2/1x32*e8m0", about="MXFP6", source=_MX),
    Known(spelling="e2m3/1x32*e8m0", preset="MXFP6", about="MXFP6, the more precise one", source=_MX),
    Known(spelling="e2m1/1x32*e8m0", preset="MXFP4", about="MXFP4, weight-only", source=_MX),
    Known(spelling="e2m1/1x32*e8m0@e2m1/1x32*e8m0", about="MXFP4 weights and activations", source=_MX),
)
