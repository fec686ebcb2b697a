"""grouped_product: products by expert where both operands are in low precision, forward and backward.

Tokens are sorted by expert, offs says where each expert's end (as `torch._grouped_mm` has it), and with x_TK, w_ENK, g_TN

    y_TN[t]   = a_TK[t] b_ENK[e]^T            forward, and grad_input with (w^T)_EKN       offs[e - 1] <= t < offs[e]
    dw_ENK[e] = a_NT[:, e] b_KT[:, e]^T       grad_weight: what is summed is the expert's own tokens

Groups are ragged, so `cast_groups`, which writes the forms of grad_weight, moves each to a multiple of 128 places, zeros below.

Legend: T tokens of all experts, E experts, N output channels, K input channels, P places: T with the rows of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import Format, Parts, dequantize
from .cast import parts_of
from .operator import define, plain
from .product import case_of_product, formats, no_autocast
from .registry import pick


def grouped_product(a: list[Tensor], b: list[Tensor], offs: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    """Products by expert of two quantized operands.

    Args:
        a, b: codes and scales of (T, K) and (E, N, K), for (T, N), the stack in any strides with its last axis dense; or of
            (N, P) and (K, P) as the columns of `cast_groups`, for (E, N, K). offs: (E,) int32, where the groups end in T or in P.
        scheme: "format of b@format of a".

    Returns:
        In `dtype`. Rows of tokens that belong to no expert are zeros or undefined.

    Raises:
        MisfitError: operands of other ranks.
    """
    if a[0].dim() != 2 or b[0].dim() not in (2, 3):
        raise MisfitError(
            f"grouped_product wants (T, K) and (E, N, K), or (N, P) and (K, P), got {a[0].shape} and {b[0].shape}."
        )
    args = (a, b, offs, scheme, dtype)
    y: Tensor = _grouped_product(*args) if plain(a[0]) else torch.ops.lowp.grouped_product(*args)
    return y


def _grouped_product(a: list[Tensor], b: list[Tensor], offs: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    shape = tuple(b[0].shape)
    case = case_of_product(scheme, a[0].device, dtype, shape[-2], shape[-1], op="grouped_product")
    fmt_a, fmt_b = formats(scheme)
    with no_autocast(a[0].device.type):
        y: Tensor = pick(case).run(parts_of(a, fmt_a), parts_of(b, fmt_b), offs, scheme, dtype)
    return y


def _product_fake(a: list[Tensor], b: list[Tensor], offs: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    rows, columns = a[0].shape[0], b[0].shape[-2]
    shape = (rows, columns) if b[0].dim() == 3 else (offs.shape[0], rows, columns)
    return a[0].new_empty(shape, dtype=dtype)


define(
    "grouped_product",
    "(Tensor[] a, Tensor[] b, Tensor offs, str scheme, ScalarType dtype) -> Tensor",
    _grouped_product,
    _product_fake,
)


def group_values(parts: Parts, fmt: Format, offs: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of an operand (N, P) that `cast_groups` made."""
    if fmt.block != "row" or parts.scale is None:
        return dequantize(parts, fmt, dtype)
    places = torch.arange(parts.qdata.shape[1], device=offs.device, dtype=offs.dtype)
    expert_P = torch.searchsorted(offs, places, right=True).clamp(max=offs.shape[0] - 1)
    return (fmt.element.decode(parts.qdata) * parts.scale.to(torch.float32)[:, expert_P]).to(dtype)


def reference(a: Parts, b: Parts, offs: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    """The meaning of grouped_product: a loop over experts, in float32."""
    (fmt_a, fmt_b), ends = formats(scheme), offs.tolist()
    groups = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if b.qdata.dim() == 3:
        a_TK, b_ENK = dequantize(a, fmt_a), dequantize(b, fmt_b)
        y_TN = a_TK.new_zeros((a_TK.shape[0], b_ENK.shape[1]))
        for group, b_NK in zip(groups, b_ENK, strict=True):
            y_TN[group] = a_TK[group] @ b_NK.T
        return y_TN.to(dtype)
    a_NP, b_KP = (group_values(parts, fmt, offs, torch.float32) for parts, fmt in ((a, fmt_a), (b, fmt_b)))
    return torch.stack([a_NP[:, group] @ b_KP[:, group].T for group in groups]).to(dtype)
