"""The last resorts: correct for every format, layout and device.

`reference` computes in float32 and is the oracle of every test. `dequantize` turns the weight into the activation's dtype and
calls torch's own product: as fast as that product plus one pass over the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...ops.cast import codes_reference, fake_cast, fake_reference
from ...ops.cast import reference as cast_reference
from ...ops.embedding import reference as embedding_reference
from ...ops.linear import prescale, weight_values
from ...ops.linear import reference as linear_reference
from ...ops.matmul import reference as matmul_reference
from ...ops.registry import Case, Kernel


def _always(case: Case) -> str:
    return ""


def _linear_dequantized(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    dtype = x_MK.dtype
    x = x_MK
    if spec.act is not None:
        x = fake_cast(x, spec.act, packed.get("act_scale"), packed.get("act_pre_scale"))
    elif "act_pre_scale" in packed:
        x = prescale(x.to(torch.float32), packed).to(dtype)
    return F.linear(x, weight_values(packed, spec, dtype), None if bias is None else bias.to(dtype))


def _matmul_dequantized(x: Tensor, packed: Packed, spec: Spec, transposed: bool) -> Tensor:
    return matmul_reference(x, packed, spec, transposed, dtype=x.dtype)


KERNELS = tuple(
    Kernel(op=op, name=name, rank=rank, layout="", why_not=_always, run=run, fallback=True, about=about)
    for op, name, rank, run, about in (
        ("linear", "dequantize", 900, _linear_dequantized, "weight to the activation's dtype, then torch's linear"),
        ("matmul", "dequantize", 900, _matmul_dequantized, "weight to the activation's dtype, then torch's matmul"),
        ("linear", "reference", 1000, linear_reference, "the definition, in float32"),
        ("matmul", "reference", 1000, matmul_reference, "the definition, in float32"),
        ("cast", "reference", 1000, cast_reference, "the definition, in torch"),
        ("fake_cast", "reference", 1000, fake_reference, "the definition, in torch"),
        ("cast_codes_as", "reference", 1000, codes_reference, "the definition, in torch"),
        ("embedding", "reference", 1000, embedding_reference, "decode the whole table, then look up"),
    )
)
