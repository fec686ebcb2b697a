"""bf16, fp16 and fp32 as formats: the float itself, cast and kept. They serve as scales, zero points and baselines."""

import torch

from ..element import Element
from ..known import Known

ELEMENTS = (
    Element(name="bf16", bits=16, kind="identity", native=torch.bfloat16, source="Kalamkar et al., arXiv 1905.12322"),
    Element(name="fp16", bits=16, kind="identity", native=torch.float16, source="IEEE 754-2019, binary16"),
    Element(name="fp32", bits=32, kind="identity", native=torch.float32, source="IEEE 754-2019, binary32"),
)


KNOWN = (Known(spelling="bf16", preset="BF16", about="no quantization: a baseline, or to cast a layer"),)
