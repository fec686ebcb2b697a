"""int4 weight-only with torch's own products: tinygemm on CUDA, `_weight_int4pack_mm_for_cpu` on the CPU.

    y_MN = x_MK @ ((code - 8) * scale + zero).T

tinygemm reads the weight once for each 16 to 64 tokens, so it loses to bf16 at large M: from there on the weight is unpacked
and dequantized once, and the float product takes over. Where that pays was measured (`benchmarks/results`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...ops.how import decoded, float_units
from ...ops.linear import prescale
from ...ops.registry import Case, Kernel

_CASES = ("int4/1x128*bf16", "int4/1x64*bf16", "int4/1x32*bf16", "int4/1x128*bf16+bf16", "int4/1x64*bf16+int8")


def _why_not(case: Case, device: str) -> str:
    if case.act is not None:
        return f"wants a weight-only scheme, got {case.scheme}"
    if case.device != device:
        return f"wants {device}, got {case.device}"
    if device == "cuda" and case.sm < 80:
        return f"wants sm80, got sm{case.sm}"
    if case.dtype != "bfloat16":  # on the CPU torch takes others, 20 to 100 times slower than its float product
        return f"wants bfloat16 activations, got {case.dtype}"
    return ""


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None, device: str) -> Tensor:
    x = prescale(x_MK, packed)
    group = int(spec.weight.block.removeprefix("1x"))
    product = torch._weight_int4pack_mm_for_cpu if device == "cpu" else torch._weight_int4pack_mm
    y_MN = product(x.contiguous(), packed["qdata"], group, packed["scale_and_zero"])
    return y_MN if bias is None else y_MN + bias.to(y_MN.dtype)


def _how(case: Case) -> str:
    if case.device == "cpu":
        return f"{decoded(case, 'in registers', 'fp32')}, fp32 sums"
    return f"{decoded(case, 'in registers')}, {float_units(case)}"


KERNELS = tuple(
    Kernel(
        op="linear", name=name, rank=200, layout=layout, why_not=functools.partial(_why_not, device=device),
        run=functools.partial(_run, device=device), how=_how, about=about, cases=_CASES,
    )
    for name, layout, device, about in (
        ("int4pack_cpu", "int4pack_cpu", "cpu", "torch._weight_int4pack_mm_for_cpu"),
        ("tinygemm", "tinygemm", "cuda", "torch._weight_int4pack_mm"),
    )
)  # fmt: skip
