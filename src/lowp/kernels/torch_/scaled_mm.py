"""float8 x float8 on tensor cores: `torch._scaled_mm`.

    y_MN = (x_q * x_scale) @ (w_q * w_scale).T + bias        scales for the tensor or for each row, multiplied after the sum

The scale follows the decoding convention of `numerics`: value = qdata * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...ops.linear import quantize_act
from ...ops.registry import Case, Kernel

_PAIRS = {
    ("e4m3/row", "e4m3/row"),
    ("e4m3/tensor", "e4m3/tensor"),
    ("e4m3/tensor", "e5m2/tensor"),
    ("e5m2/tensor", "e4m3/tensor"),
}


def _why_not(case: Case) -> str:
    weight, act = case.weight, case.act
    if act is None or (str(weight), str(act)) not in _PAIRS:
        return f"wants float8 weight and activation, both by row (e4m3) or both by tensor, got {case.scheme}"
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    wanted = 90 if weight.block == "row" else 89
    if case.sm < wanted:
        return f"wants sm{wanted}, got sm{case.sm}"
    if len(case.shape) != 2 or any(size % 16 for size in case.shape):
        return f"wants a matrix with N and K in multiples of 16, got {case.shape}"
    if weight.block == "row" and case.dtype not in ("bfloat16", "float32"):
        return f"wants bfloat16 or float32 results with scales by row, got {case.dtype}"
    return ""


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    act = spec.act
    assert act is not None
    x = x_MK if "act_pre_scale" not in packed else x_MK * packed["act_pre_scale"].to(x_MK.dtype)
    parts = quantize_act(x, act, packed.get("act_scale"))
    assert parts.scale is not None
    by_row = act.block == "row"
    scale_a = parts.scale if by_row else parts.scale.reshape(())
    scale_b = packed["scale"].reshape(1, -1) if by_row else packed["scale"].reshape(())
    out_dtype = torch.bfloat16 if by_row else x_MK.dtype  # by row torch writes bfloat16 only
    y_MN = torch._scaled_mm(
        parts.qdata, packed["qdata"].t(), scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=True
    )
    y_MN = y_MN if bias is None else y_MN + bias.to(y_MN.dtype)
    return y_MN.to(x_MK.dtype)


KERNELS = (
    Kernel(
        op="linear",
        name="scaled_mm",
        rank=200,
        layout="plain",
        why_not=_why_not,
        run=_run,
        about="torch._scaled_mm, activation cast in torch",
        cases=("e4m3/row@e4m3/row", "e4m3/tensor@e4m3/tensor"),
    ),
)
