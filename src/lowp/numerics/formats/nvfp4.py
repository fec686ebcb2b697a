"""NVFP4: 16 float4 elements share an e4m3 scale, and the matrix shares one fp32 scale.

    value = e2m1 * e4m3 scale of the block * fp32 scale of the tensor
    scale of the tensor = amax / (448 * 6)         so that the largest block scale is e4m3's largest value

Block scales below e4m3's smallest normal number, 2**-6, are raised to it. Source: NVIDIA, Pretraining LLMs with NVFP4, arXiv 2509.25149, section 2.
"""

from ..known import Known

_SOURCE = "arXiv 2509.25149, section 2"

KNOWN = (
    Known(spelling="e2m1/1x16*e4m3/tensor", preset="NVFP4", about="NVFP4, weight-only", source=_SOURCE),
    Known(
        spelling="e2m1/1x16*e4m3/tensor@e2m1/1x16*e4m3/tensor", about="NVFP4 weights and activations", source=_SOURCE
    ),
    Known(spelling="e2m1/1x16*e4m3", about="NVFP4 without the scale of the tensor", source=_SOURCE),
)
