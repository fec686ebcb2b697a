"""int8 weight-only on the CPU: `torch._weight_int8pack_mm`, which reads int8 rows and one scale for each.

From 4 tokens on torch's product loads 16 bytes at a time from addresses that must be multiples of 16, and stops the process where
they are not, as in a mapped file. Such a weight is copied for each product; put it elsewhere once (`.clone()`) to save that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...ops.how import decoded
from ...ops.linear import prescale
from ...ops.registry import Case, Kernel


@torch.library.custom_op("lowp::int8pack_cpu", mutates_args=(), device_types="cpu")
def int8pack_cpu(x_MK: Tensor, w_NK: Tensor, scale_N: Tensor) -> Tensor:
    """(M, K) times int8 (N, K).T, scaled -> (M, N). An operator of its own, because torch's wants the scale in x's dtype and
    torch.compile's lowering of it wants that scale in memory already."""
    w_NK = w_NK if w_NK.data_ptr() % 16 == 0 else w_NK.clone()
    return torch._weight_int8pack_mm(x_MK, w_NK, scale_N.to(x_MK.dtype))


@int8pack_cpu.register_fake
def _(x_MK: Tensor, w_NK: Tensor, scale_N: Tensor) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], w_NK.shape[0]))


def _why_not(case: Case) -> str:
    weight = case.weight
    if case.act is not None:
        return f"wants a weight-only scheme, got {case.scheme}"
    if str(weight).split("*")[0] != "int8/row" or weight.zero_point or weight.nested or weight.scale == "e8m0":
        return f"wants int8/row, got {weight}"
    if case.device != "cpu":
        return f"wants cpu, got {case.device}"
    if len(case.shape) != 2 or case.shape[-1] % 16 or case.shape[-2] % 16:
        return f"wants a matrix with N and K in multiples of 16, got {case.shape}"
    if case.dtype != "bfloat16":  # torch takes others, 5 to 80 times slower than its float product
        return f"wants bfloat16 activations, got {case.dtype}"
    return ""


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    x = prescale(x_MK, packed)
    y_MN = int8pack_cpu(x.contiguous(), packed["qdata"], packed["scale"].view(-1))
    return y_MN if bias is None else y_MN + bias.to(y_MN.dtype)


KERNELS = (
    Kernel(
        op="linear",
        name="int8pack_cpu",
        rank=300,
        layout="plain",
        why_not=_why_not,
        run=_run,
        how=lambda case: f"{decoded(case, 'in registers', 'fp32')}, fp32 sums",
        about="torch._weight_int8pack_mm",
        cases=("int8/row", "int8/row*bf16"),
    ),
)
