"""embedding: rows of a quantized table, dequantized.

y = ((qdata[ids] - zero_point) * scale)          only the rows that are asked for are decoded, where the layout allows
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts import Spec
from ..layouts.base import Packed
from .linear import weight_values
from .registry import picked


def embedding(ids: Tensor, packed: Packed, spec: Spec, dtype: torch.dtype) -> Tensor:
    """Look rows up in a packed table.

    Args:
        ids: any shape, integers below V. packed, spec: the table (V, K). dtype: of the result.

    Returns:
        (*ids.shape, K), in `dtype`.
    """
    return picked("embedding", ids, packed, spec).run(ids, packed, spec, dtype)


def reference(ids: Tensor, packed: Packed, spec: Spec, dtype: torch.dtype) -> Tensor:
    """The meaning of embedding: decode the whole table, then look up."""
    return torch.nn.functional.embedding(ids, weight_values(packed, spec, dtype))
