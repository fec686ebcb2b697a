"""Integers of 1 to 8 bits, signed and unsigned, and ternary.

Symmetric: value = qdata * scale. Asymmetric: value = (qdata - zero_point) * scale, with a zero point that is an integer (so
that 0.0 is exact, which padding and ReLU want) or a float (tinygemm, HQQ: no grid point needs to be 0.0).

int1 holds {-1, 0} (two's complement), so it wants a zero point; ternary holds {-1, 0, 1} in 2 bits (BitNet b1.58, arXiv 2402.17764).
"""

import torch

from ..element import Element
from ..known import Known

_NATIVE = {"int8": torch.int8, "uint8": torch.uint8}
_SOURCE = "Jacob et al., arXiv 1712.05877, section 2.1"

ELEMENTS = (
    *(
        Element(
            name=f"{u}int{bits}",
            bits=bits,
            kind="int",
            signed=not u,
            native=_NATIVE.get(f"{u}int{bits}"),
            source=_SOURCE,
        )
        for u in ("", "u")
        for bits in range(1, 9)
    ),
    Element(name="ternary", bits=2, kind="int", limits=(-1, 1), source="Ma et al., arXiv 2402.17764, section 2"),
)


KNOWN = (
    Known(
        spelling="int8/row", preset="INT8", about="weight-only, half the bytes of bf16, next to no loss", source=_SOURCE
    ),
    Known(
        spelling="int8/row@int8/row",
        preset="INT8_DYNAMIC",
        about="8-bit weights and per-token activations",
        source="LLM.int8, arXiv 2208.07339",
    ),
    Known(spelling="int6/1x128*bf16", about="weight-only, between int8 and int4"),
    Known(spelling="int5/1x128*bf16", about="weight-only, between int8 and int4"),
    Known(
        spelling="int4/1x128*bf16", preset="INT4", about="weight-only, groups of 128", source="GPTQ, arXiv 2210.17323"
    ),
    Known(spelling="int4/1x32*bf16", about="weight-only, groups of 32"),
    Known(
        spelling="int4/1x128*bf16+bf16",
        preset="INT4_ASYM",
        about="asymmetric with a float zero point",
        source="tinygemm; HQQ",
    ),
    Known(
        spelling="int4/1x64*bf16+int8", about="asymmetric with an integer zero point", source="AWQ, arXiv 2306.00978"
    ),
    Known(
        spelling="int4/1x32*bf16@int8/row+int8",
        preset="INT4_DYNAMIC",
        about="4-bit weights, asymmetric 8-bit activations: phones",
        source="8da4w of ExecuTorch",
    ),
    Known(
        spelling="int4/1x128*bf16@e4m3/row",
        about="4-bit weights, float8 activations: on float8 tensor cores",
        source="QServe, arXiv 2405.04532 (as W4A8)",
    ),
    Known(spelling="int4/1x128*bf16@int8/row", about="4-bit weights, 8-bit activations"),
    Known(spelling="int3/1x64*bf16+bf16", preset="INT3", about="weight-only, groups of 64, asymmetric"),
    Known(spelling="int2/1x32*bf16+bf16", preset="INT2", about="weight-only, groups of 32, asymmetric"),
    Known(spelling="int7/row", about="weight-only, odd width"),
    Known(spelling="int1/1x32*bf16+bf16", about="one bit: the sign against a float zero point"),
    Known(spelling="uint4/1x128*bf16+int8", about="unsigned codes as GPTQ and AWQ checkpoints hold them"),
    Known(spelling="uint8/tensor+int32", about="per-tensor asymmetric", source=_SOURCE),
    Known(spelling="int8/tensor", about="one scale for the matrix", source=_SOURCE),
    Known(spelling="int8/1x32*e8m0", about="MXINT8", source="OCP MX v1.0, section 5.3.4"),
    Known(spelling="ternary/tensor*bf16", about="BitNet b1.58", source="arXiv 2402.17764, section 2"),
)
