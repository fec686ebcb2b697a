"""The last resorts: correct for every format, layout and device.

`reference` computes in float32 and is the oracle of every test. `dequantize` turns the weight into the activation's dtype and
calls torch's own product: as fast as that product plus one pass over the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...numerics import Parts, dequantize
from ...ops.cast import (
    both_reference,
    codes_reference,
    fake_cast,
    fake_reference,
    interleaved_reference,
    why_not_interleaved,
)
from ...ops.cast import reference as cast_reference
from ...ops.cast_groups import reference as groups_reference
from ...ops.columns import reference as columns_reference
from ...ops.embedding import reference as embedding_reference
from ...ops.fake_quantize import given_grad_reference, given_reference
from ...ops.fake_quantize import grad_reference as fake_quantize_grad_reference
from ...ops.fake_quantize import reference as fake_quantize_reference
from ...ops.grouped import reference as grouped_reference
from ...ops.grouped_product import group_values
from ...ops.grouped_product import reference as grouped_product_reference
from ...ops.how import decoded, short, with_activation
from ...ops.linear import act_values, prescale, weight_values
from ...ops.linear import reference as linear_reference
from ...ops.matmul import reference as matmul_reference
from ...ops.product import formats, values_product
from ...ops.product import reference as product_reference
from ...ops.registry import Case, Kernel
from ...ops.update import RULES
from ...ops.update import reference as update_reference


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


def _grouped_dequantized(x: Tensor, packed: Packed, spec: Spec, offs: Tensor | None) -> Tensor:
    w_EKN = weight_values(packed, spec, x.dtype).mT
    values = act_values(x, packed, spec, torch.float32).to(x.dtype) if spec.act or "act_pre_scale" in packed else x
    return values @ w_EKN if offs is None else torch._grouped_mm(values, w_EKN, offs=offs)


def _why_not_grouped(case: Case) -> str:
    """What torch._grouped_mm wants."""
    if case.device != "cuda":
        return ""
    if case.dtype != "bfloat16" or case.sm < 80:
        return f"wants bfloat16 on sm80, got {case.dtype} on sm{case.sm}"
    if any(size % 8 for size in case.shape[-2:]):
        return f"wants N and K in multiples of 8, got {case.shape}"
    return ""


def _product_dequantized(a: Parts, b: Parts, scheme: str, dtype: torch.dtype, fast: bool) -> Tensor:
    return values_product(a, b, scheme, dtype, dtype)


def _grouped_product_dequantized(a: Parts, b: Parts, offs: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    fmt_a, fmt_b = formats(scheme)
    if b.qdata.dim() == 3:
        values = dequantize(b, fmt_b, torch.bfloat16).mT
        return torch._grouped_mm(dequantize(a, fmt_a, torch.bfloat16), values, offs=offs).to(dtype)
    a_NP, b_KP = (group_values(parts, fmt, offs, torch.bfloat16) for parts, fmt in ((a, fmt_a), (b, fmt_b)))
    return torch._grouped_mm(a_NP, b_KP.t(), offs=offs).to(dtype)


def _why_not_product(case: Case) -> str:
    """On a CPU the reference is as fast, and its numbers are those of the float8 units: exact products, float32 sums."""
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    return "" if case.dtype in ("bfloat16", "float16") else f"wants bfloat16 or float16, got {case.dtype}"


def _both_operands(case: Case, to: str) -> str:
    names = sorted({fmt.element.name for fmt in (case.weight, case.act) if fmt is not None and not fmt.is_identity})
    return f"emulated: {' and '.join(names)} decoded to {to}, torch's {to} product"


def _dequantized(case: Case, product: str) -> str:
    return f"{decoded(case)}, torch's {short(case)} {product}"


def _by_reference(case: Case, product: str) -> str:
    return f"{decoded(case, to='fp32')}, torch's fp32 {product}"


def _with_activation(case: Case, how: Callable[[Case, str], str], product: str) -> str:
    return with_activation(case, how(case, product))


def _cast_in_torch(case: Case) -> str:
    return f"{case.weight.element.name} by torch's operators, one after the other"


def _columns_in_torch(case: Case) -> str:
    return f"{case.weight.element.name} codes by torch's operators, a column at a time"


def _step_in_torch(case: Case) -> str:
    return f"states in {case.scheme.replace('@', ' and ')} decoded, updated and quantized by torch's operators"


def _last(
    op: str,
    name: str,
    run: Callable[..., Any],
    about: str,
    how: Callable[[Case], str],
    why_not: Callable[[Case], str] = _always,
) -> Kernel:
    rank = 900 if name == "dequantize" else 1000
    return Kernel(op=op, name=name, rank=rank, layout="", why_not=why_not, run=run, how=how, fallback=True, about=about)


_DEFINITION = "the definition, in float32"
_IN_TORCH = "the definition, in torch"

KERNELS = (
    _last(
        "linear", "dequantize", _linear_dequantized, "weight to the activation's dtype, then torch's linear",
        partial(_with_activation, how=_dequantized, product="linear"),
    ),
    _last(
        "matmul", "dequantize", _matmul_dequantized, "weight to the activation's dtype, then torch's matmul",
        partial(_dequantized, product="matmul"),
    ),
    _last(
        "grouped", "dequantize", _grouped_dequantized, "weights decoded, then torch._grouped_mm",
        partial(_with_activation, how=_dequantized, product="grouped product"), _why_not_grouped,
    ),
    _last(
        "linear", "reference", linear_reference, _DEFINITION,
        partial(_with_activation, how=_by_reference, product="product"),
    ),
    _last("matmul", "reference", matmul_reference, _DEFINITION, partial(_by_reference, product="product")),
    _last(
        "grouped", "reference", grouped_reference, "every token times every expert, its own kept",
        partial(_with_activation, how=_by_reference, product="product of every token and every expert"),
    ),
    _last(
        "product", "dequantize", _product_dequantized, "both operands decoded, then torch's product",
        lambda case: _both_operands(case, short(case)), _why_not_product,
    ),
    _last(
        "grouped_product", "dequantize", _grouped_product_dequantized, "both operands decoded, then torch._grouped_mm",
        lambda case: _both_operands(case, "bf16"), _why_not_product,
    ),
    _last(
        "grouped_product", "reference", grouped_product_reference, "a loop over experts, in float32",
        lambda case: _both_operands(case, "fp32"),
    ),
    _last("product", "reference", product_reference, _DEFINITION, lambda case: _both_operands(case, "fp32")),
    _last("cast", "reference", cast_reference, _IN_TORCH, _cast_in_torch),
    _last("cast_both", "reference", both_reference, _IN_TORCH, _cast_in_torch),
    _last("cast_groups", "reference", groups_reference, _IN_TORCH, _cast_in_torch),
    _last("fake_cast", "reference", fake_reference, _IN_TORCH, _cast_in_torch),
    _last("cast_codes_as", "reference", codes_reference, _IN_TORCH, _cast_in_torch),
    _last(
        "cast_interleaved", "reference", interleaved_reference, _IN_TORCH, _cast_in_torch, why_not_interleaved
    ),
    _last("fake_quantize", "reference", fake_quantize_reference, _IN_TORCH, _cast_in_torch),
    _last("fake_quantize_grad", "reference", fake_quantize_grad_reference, _IN_TORCH, _cast_in_torch),
    _last("fake_quantize_given", "reference", given_reference, _IN_TORCH, _cast_in_torch),
    _last("fake_quantize_given_grad", "reference", given_grad_reference, _IN_TORCH, _cast_in_torch),
    _last(
        "embedding", "reference", embedding_reference, "decode the whole table, then look up",
        lambda case: f"{decoded(case)}, the whole table, then looked up",
    ),
    _last("round_columns", "reference", columns_reference, _IN_TORCH, _columns_in_torch),
    *(
        _last(rule, "reference", partial(update_reference, rule), _IN_TORCH, _step_in_torch)
        for rule in RULES
    ),
)  # fmt: skip
