"""product: two operands that are in low precision both, contracted over their last axis.

    y_MN = a_MK b_NK^T = ((a_qdata - a_zero) * a_scale) @ ((b_qdata - b_zero) * b_scale).T

It is what is left of `linear` once the activation is cast, and all that training needs: with the operands of a linear layer
x_MK, w_NK and the gradient g_MN, each quantized along the axis that is summed,

    output       y_MN  = product(x_MK, w_NK)           summed over K
    grad_input   dx_MK = product(g_MN, (w^T)_KN)       summed over N
    grad_weight  dw_NK = product((g^T)_NM, (x^T)_KM)   summed over M

Its scheme is spelled as that of a linear layer: format of b, "@", format of a. One of the two may be an identity float ("bf16").

Legend: M rows of a, N rows of b, K the axis that is summed.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from ..numerics import Format, Parts, Scheme, dequantize
from .cast import parts_of
from .operator import define, plain
from .registry import Case, Kernel, device_capability, pick, verdicts

_LONGEST = 1 << 16  # codes along the summed axis: 2^16 x 128^2 fits in an int32


def product(a: list[Tensor], b: list[Tensor], scheme: str, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Matrix product of two quantized operands.

    Args:
        a, b: the tensors of (M, K) and (N, K), as `cast_both` answers them; a float operand is itself alone.
        scheme: "format of b@format of a". dtype: of the result.
        fast: sums may stay in the tensor core, which holds fewer bits than float32 (what torch calls fast accumulation).

    Returns:
        (M, N) in `dtype`.

    Raises:
        KernelError: in strict mode, where only a fallback can run.
    """
    if plain(a[0]) and plain(b[0]):
        return _product(a, b, scheme, dtype, fast)
    y_MN: Tensor = torch.ops.lowp.product(a, b, scheme, dtype, fast)
    return y_MN


def formats(scheme: str) -> tuple[Format, Format]:
    """The formats of a and of b."""
    parsed = Scheme.parse(scheme)
    return parsed.act or Format.parse("bf16"), parsed.weight


def _product(a: list[Tensor], b: list[Tensor], scheme: str, dtype: torch.dtype, fast: bool) -> Tensor:
    (rows, width), columns, device = a[0].shape, b[0].shape[0], a[0].device
    if 0 in (rows, width, columns):
        return a[0].new_zeros((rows, columns), dtype=dtype)
    if width > _LONGEST and _overflows(scheme):
        return _in_pieces(a, b, scheme, dtype, fast)
    kernel = _kernel(scheme, device.type, device.index, dtype, columns, width)
    if kernel is None or kernel.fallback:  # asked at each call: strict mode may have begun
        kernel = pick(case_of_product(scheme, device, dtype, columns, width))
    fmt_a, fmt_b = formats(scheme)
    with no_autocast(device.type):
        y_MN: Tensor = kernel.run(parts_of(a, fmt_a), parts_of(b, fmt_b), scheme, dtype, fast)
    return y_MN


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, which would round the float32 operands of an emulated product."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def _in_pieces(a: list[Tensor], b: list[Tensor], scheme: str, dtype: torch.dtype, fast: bool) -> Tensor:
    """The sum over pieces of the summed axis, in float32: what a product over many tokens is, whose int32 would overflow."""
    total: Tensor | None = None
    for a_piece, b_piece in zip(a[0].split(_LONGEST, 1), b[0].split(_LONGEST, 1), strict=True):
        y_MN = _product([a_piece.contiguous(), *a[1:]], [b_piece.contiguous(), *b[1:]], scheme, torch.float32, fast)
        total = y_MN if total is None else total.add_(y_MN)
    assert total is not None
    return total.to(dtype)


def _overflows(scheme: str) -> bool:
    """Whether codes of 8 bits are summed over the whole axis, for one scale."""
    return all(fmt.element.kind == "int" and fmt.block in ("row", "tensor") for fmt in formats(scheme))


def case_of_product(
    scheme: str, device: torch.device, dtype: torch.dtype, columns: int, width: int, *, op: str = "product"
) -> Case:
    """The case of a product whose b is (columns, width), whatever the rows of a."""
    return Case(
        op=op,
        scheme=scheme,
        device=device.type,
        sm=device_capability(device.type, device.index),
        dtype=str(dtype).removeprefix("torch."),
        shape=(columns, width),
    )


@functools.lru_cache(maxsize=65536)
def _kernel(scheme: str, device: str, index: int | None, dtype: torch.dtype, columns: int, width: int) -> Kernel | None:
    where = torch.device(device) if index is None else torch.device(device, index)
    case = case_of_product(scheme, where, dtype, columns, width)
    return next((verdict.kernel for verdict in verdicts(case) if verdict.chosen), None)


def _fake(a: list[Tensor], b: list[Tensor], scheme: str, dtype: torch.dtype, fast: bool) -> Tensor:
    return a[0].new_empty((a[0].shape[0], b[0].shape[0]), dtype=dtype)


define("product", "(Tensor[] a, Tensor[] b, str scheme, ScalarType dtype, bool fast) -> Tensor", _product, _fake)


def reference(a: Parts, b: Parts, scheme: str, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """The meaning of product: the values in float32, multiplied in float32."""
    return values_product(a, b, scheme, torch.float32, dtype)


def values_product(a: Parts, b: Parts, scheme: str, compute: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Both operands dequantized to `compute` and multiplied by torch."""
    fmt_a, fmt_b = formats(scheme)
    return (dequantize(a, fmt_a, compute) @ dequantize(b, fmt_b, compute).T).to(dtype)
