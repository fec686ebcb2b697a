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
from ...ops.embedding import reference as embedding_reference
from ...ops.linear import act_values, weight_values
from ...ops.linear import reference as linear_reference
from ...ops.matmul import reference as matmul_reference
from ...ops.registry import Case, Kernel


def _always(case: Case) -> str:
    return ""


def _linear_dequantized(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    dtype = x_MK.dtype
    x = act_values(x_MK, packed, spec, torch.float32).to(dtype) if spec.act or "act_pre_scale" in packed else x_MK
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
        ("embedding", "reference", 1000, embedding_reference, "decode the whole table, then look up"),
    )
)
