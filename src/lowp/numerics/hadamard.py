"""A rotation of activations at run time: signs, then a Hadamard matrix over each group of columns.

    y = (x * signs) H        H_1 = 1,   H_2p = [H_p  H_p; H_p  -H_p] / sqrt(2)        symmetric and orthonormal

The groups are as wide as the largest power of two that divides K (768: three groups of 256; 14336: seven of 2048), so that any K
has one without a matrix of its own. H is never made: p log2 p additions do (the fast Walsh-Hadamard transform). A weight whose
columns are rotated the same way gives the same product, y (W diag(signs) H)^T = x W^T, and neither holds an outlier any more.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4 (stage 1c); Fino and Algazi, IEEE Trans. Computers C-25, 1976.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_of(columns: int) -> int:
    """Columns that are mixed with one another.

    >>> group_of(14336)
    2048
    """
    return columns & -columns


def rotated(x: Tensor, signs_K: Tensor) -> Tensor:
    """(x * signs) H, in float32, then x's dtype.

    Args:
        x: (..., K), float. signs_K: (K,) of 1 and -1.

    >>> x = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
    >>> rotated(x, torch.ones(4))
    tensor([[2., 2., 2., 2.]])
    """
    return _transformed(x.to(torch.float32) * signs_K.to(torch.float32)).to(x.dtype)


def unrotated(y: Tensor, signs_K: Tensor) -> Tensor:
    """The inverse of `rotated`: (y H) * signs."""
    return (_transformed(y.to(torch.float32)) * signs_K.to(torch.float32)).to(y.dtype)


def _transformed(x: Tensor) -> Tensor:
    size, half = group_of(x.shape[-1]), 1
    y = x.reshape(-1, size)
    while half < size:
        first, second = y.view(len(y), -1, 2, half).unbind(2)
        y = torch.stack((first + second, first - second), dim=2).view(len(y), size)
        half *= 2
    return (y * size**-0.5).reshape(x.shape)
