"""Embedding by gathering the packed rows and decoding only those."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...ops.linear import weight_values
from ...ops.registry import Case, Kernel


def _why_not(case: Case) -> str:
    fmt = case.weight
    if len(case.shape) != 2:
        return f"wants a table (V, K), got shape {case.shape}"
    rows = 1 if fmt.is_identity or fmt.block == "tensor" else fmt.block_dims(case.shape)[0]
    if rows != 1 or (fmt.nested and fmt.nested.block != "tensor"):
        return f"wants scales that belong to one row or to the table, got {fmt}"
    return ""


def _run(ids: Tensor, packed: Packed, spec: Spec, dtype: torch.dtype) -> Tensor:
    flat = ids.reshape(-1)
    rows = {name: tensor[flat] if _by_row(name, spec) else tensor for name, tensor in packed.items()}
    values = weight_values(rows, spec.with_shape((flat.shape[0], spec.shape[-1])), dtype)
    return values.reshape(*ids.shape, spec.shape[-1])


def _by_row(name: str, spec: Spec) -> bool:
    if name == "qdata":
        return True
    return name in ("scale", "zero_point") and spec.weight.block != "tensor"


KERNELS = (
    Kernel(
        op="embedding",
        name="gather",
        rank=500,
        layout="plain",
        why_not=_why_not,
        run=_run,
        how=lambda case: f"rows gathered packed, {case.weight.element.name} decoded after by torch's operators",
        about="packed rows, decoded after the look-up",
    ),
)
