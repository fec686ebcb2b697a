"""NF4: sixteen quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.

Trained weights are near normal, so each code is used about equally often. With double quantization the scales of 64 elements
are themselves int8, in blocks of 256, after their mean is taken off (a scale is positive: the mean is its zero point).

Source: QLoRA, arXiv 2305.14314, section 3 and appendix E.
"""

from ..element import Element
from ..known import Known

_QLORA = "QLoRA, arXiv 2305.14314, section 3"

ELEMENTS = (
    Element(
        name="nf4",
        bits=4,
        kind="codebook",
        ties="down",
        codebook=(
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
            -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ),
        source="QLoRA, arXiv 2305.14314, appendix E",
    ),
)  # fmt: skip


KNOWN = (
    Known(spelling="nf4/1x64*int8/1x256", preset="NF4", about="double quantized", source=_QLORA),
    Known(spelling="nf4/1x64*bf16", about="NF4 with plain bf16 scales", source=_QLORA),
)
