"""float8 x float8 on tensor cores: `torch._scaled_mm`.

    y_MN = (x_q * x_scale) @ (w_q * w_scale).T + bias        scales for the tensor or for each row, multiplied after the sum

The tensor cores sum float8 products in fewer bits than float32 has, so a float32 result would promise more than it holds:
float32 activations are left to other kernels. By row torch writes bfloat16 only.

The scale follows the decoding convention of `numerics`: value = qdata * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...ops.linear import quantized_input
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
    dtypes = ("bfloat16",) if weight.block == "row" else ("bfloat16", "float16")
    if case.dtype not in dtypes:
        return f"wants {' or '.join(dtypes)} results with scales by {weight.block}, got {case.dtype}"
    return ""


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    parts, x_scale = quantized_input(x_MK, packed, spec)
    by_row = spec.weight.block == "row"
    scale_a = x_scale if by_row else x_scale.reshape(())
    scale_b = packed["scale"].reshape(1, -1) if by_row else packed["scale"].reshape(())
    y_MN = torch._scaled_mm(
        parts.qdata, packed["qdata"].t(), scale_a=scale_a, scale_b=scale_b, out_dtype=x_MK.dtype, use_fast_accum=True
    )
    return y_MN if bias is None else y_MN + bias.to(y_MN.dtype)


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
