"""float8 by expert on tensor cores: `torch._scaled_grouped_mm`, sm90, scales by row, results in bfloat16.

    y_TN[t]   = (a_TK[t] * a_scale_T[t]) @ (b_ENK[e] * b_scale_EN[e]).T         tokens of an expert are rows
    dw_ENK[e] = (a_NP[:, e] * a_scale_NE) @ (b_KP[:, e] * b_scale_KE).T         tokens of an expert are what is summed

In the second form torch wants the scales expert by expert, one after the other, (E * N,) and (E * K,), and no expert without a
place: it ends the process there ("CUTLASS cannot handle delta=0", aten/src/ATen/native/cuda/GroupMMCommon.cuh).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...numerics import Parts
from ...ops.registry import Case, Kernel


def why_not_rows(case: Case) -> str:
    """ "" or why a case is not float8 by row on a Hopper."""
    weight, act = case.weight, case.act
    wanted = {"e4m3/row", "e4m3/row*e8m0"}
    if act is None or {str(weight), str(act)} - wanted:
        return f"wants e4m3 by row on both sides, got {case.scheme}"
    if case.device != "cuda" or case.sm != 90:
        return f"wants cuda and sm90, got {case.device} and sm{case.sm}"
    if any(size % 16 for size in case.shape):
        return f"wants N and K in multiples of 16, got {case.shape}"
    return "" if case.dtype in ("bfloat16", "float32") else f"wants bfloat16, or float32 by way of it, got {case.dtype}"


def scaled_grouped(a: Parts, b: Parts, offs: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    """grouped_product by torch."""
    assert a.scale is not None and b.scale is not None
    a_scale, b_scale = a.scale.to(torch.float32), b.scale.to(torch.float32)
    if b.qdata.dim() == 3:
        a_scale, b_scale, right = a_scale.reshape(-1), b_scale.squeeze(-1), b.qdata.mT
    else:
        a_scale, b_scale, right = (a_scale.t().reshape(-1), b_scale.t().reshape(-1), b.qdata.t())
    y = torch._scaled_grouped_mm(
        a.qdata, right, a_scale, b_scale, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y.to(dtype)


KERNELS = (
    Kernel(
        op="grouped_product",
        name="scaled_grouped_mm",
        rank=200,
        layout="",
        why_not=why_not_rows,
        run=scaled_grouped,
        how=lambda case: "native: float8 tensor cores by torch._scaled_grouped_mm",
        about="torch._scaled_grouped_mm",
        cases=("e4m3/row@e4m3/row", "e4m3/row*e8m0@e4m3/row*e8m0"),
    ),
)
