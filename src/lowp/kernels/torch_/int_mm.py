"""int8 x int8 with int32 sums: `torch._int_mm`, scales applied after.

    y_MN = (x_q @ w_q.T) * x_scale_M * w_scale_N          symmetric
         - x_scale_M * x_zero_M * sum_K(w_q) * w_scale_N   where the activation has a zero point

On CUDA torch refuses M <= 16 and K or N that are not multiples of 8: small batches are padded, inside an operator of ours, so
that a traced graph does not depend on M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...numerics import Format, Parts
from ...ops.how import native
from ...ops.linear import quantized_input
from ...ops.registry import Case, Kernel

_ROW_FORMATS = ("int8/row", "int8/tensor")


@torch.library.custom_op("lowp::int_mm", mutates_args=())
def int_mm(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """int8 (M, K) @ int8 (N, K).T -> int32 (M, N), any M."""
    rows = a_MK.shape[0]
    if a_MK.device.type == "cuda" and rows <= 16:
        a_MK = torch.nn.functional.pad(a_MK, (0, 0, 0, 32 - rows))
    elif rows == 0:
        return a_MK.new_empty((0, b_NK.shape[0]), dtype=torch.int32)
    return torch._int_mm(a_MK, b_NK.t())[:rows].clone() if a_MK.shape[0] != rows else torch._int_mm(a_MK, b_NK.t())


@int_mm.register_fake
def _(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return a_MK.new_empty((a_MK.shape[0], b_NK.shape[0]), dtype=torch.int32)


def _why_not(case: Case) -> str:
    weight, act = case.weight, case.act
    if act is None or act.element.name != "int8" or act.block not in ("row", "tensor") or act.nested:
        return f"wants int8 activations, a scale for each row or the tensor, got {act or 'weight-only'}"
    if str(weight).split("*")[0] not in _ROW_FORMATS or weight.zero_point or weight.nested:
        return f"wants symmetric int8 weights with a scale for each row or the tensor, got {weight}"
    if case.device not in ("cpu", "cuda"):
        return f"wants cpu or cuda, got {case.device}"
    if len(case.shape) != 2:
        return f"wants a matrix, got shape {case.shape}"
    if case.device == "cuda" and (case.sm < 80 or any(size % 8 for size in case.shape)):
        return f"wants sm80 or later and N, K in multiples of 8 on cuda, got sm{case.sm} and {case.shape}"
    return ""


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    parts, x_scale = quantized_input(x_MK, packed, spec)
    return scale_sums(parts.qdata, x_scale, parts.zero_point, packed["qdata"], packed["scale"], bias, x_MK.dtype)


def scale_sums(
    a_MK: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    w_NK: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """int8 (M, K) times int8 (N, K).T, scaled, in `dtype`.

    Args:
        a_scale, a_zero: (M, 1) or (1, 1). w_scale: (N, 1) or (1, 1). bias: (N,) or None.
    """
    sums_MN = int_mm(a_MK, w_NK).to(torch.float32)
    if a_zero is not None:
        sums_MN = sums_MN - a_zero.to(torch.float32) * w_NK.sum(dim=-1, dtype=torch.int32).to(torch.float32)
    y_MN = sums_MN * a_scale.to(torch.float32) * w_scale.to(torch.float32).view(-1)
    y_MN = y_MN if bias is None else y_MN + bias.to(torch.float32)
    return y_MN.to(dtype)


def _why_not_product(case: Case) -> str:
    if case.act is None or not _codes(case.weight) or not _codes(case.act):
        return f"wants int8 or ternary by row or tensor on both sides, without zero points, got {case.scheme}"
    if case.device not in ("cpu", "cuda"):
        return f"wants cpu or cuda, got {case.device}"
    if case.device == "cuda" and (case.sm < 80 or any(size % 8 for size in case.shape)):
        return f"wants sm80 or later and N, K in multiples of 8 on cuda, got sm{case.sm} and {case.shape}"
    return ""


def _codes(fmt: Format) -> bool:
    plain = fmt.zero_point is None and fmt.nested is None
    return fmt.element.name in ("int8", "ternary") and fmt.block in ("row", "tensor") and plain


def _run_product(a: Parts, b: Parts, scheme: str, dtype: torch.dtype, fast: bool) -> Tensor:
    assert a.scale is not None and b.scale is not None
    return scale_sums(a.qdata, a.scale, None, b.qdata, b.scale, None, dtype)


def _how(case: Case) -> str:
    units = "tensor cores" if case.device == "cuda" else f"products on the {case.device}"
    return native(case, f"int8 {units} with int32 sums by torch._int_mm")


KERNELS = (
    Kernel(
        op="linear",
        name="int_mm",
        rank=200,
        layout="plain",
        why_not=_why_not,
        run=_run,
        how=_how,
        about="torch._int_mm, the activation cast first",
        cases=("int8/row@int8/row", "int8/row@int8/row+int8", "int8/tensor@int8/tensor", "int8/row*bf16@int8/row"),
    ),
    Kernel(
        op="product",
        name="int_mm",
        rank=200,
        layout="",
        why_not=_why_not_product,
        run=_run_product,
        how=lambda case: "native: int8 products with int32 sums by torch._int_mm",
        about="torch._int_mm, the scales after",
        cases=("int8/row@int8/row", "int8/tensor@int8/tensor", "ternary/tensor@int8/row"),
    ),
)
