"""matmul: y = x W with a quantized matrix on the right, not transposed; batched for stacks of matrices (experts).

    y = x_MK @ ((qdata_KN - zero_point) * scale)          or the batched form, (E, M, K) @ (E, K, N)

It is what a gradient flows back through, grad_x = grad_y @ W, so the activation is not quantized here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import Spec
from ..layouts.base import Packed
from .linear import weight_values
from .registry import picked


def matmul(x: Tensor, packed: Packed, spec: Spec, *, transposed: bool = False) -> Tensor:
    """Matrix product with a packed right-hand side.

    Args:
        x: (..., M, K), any float dtype. packed, spec: the matrices, (..., K, N), or (..., N, K) where `transposed`.

    Returns:
        (..., M, N), in x's dtype.
    """
    return picked("matmul", x, packed, spec).run(x, packed, spec, transposed)


def reference(
    x: Tensor, packed: Packed, spec: Spec, transposed: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The meaning of matmul; `dtype` is what it computes in."""
    weight = weight_values(packed, spec, dtype)
    return (x.to(dtype) @ (weight.mT if transposed else weight)).to(x.dtype)
