"""grouped: each token times the matrix of its expert, the tokens sorted by expert. What a mixture of experts computes.

    y_TN[t] = act_quantize(x_TK[t]) @ ((qdata_ENK[e] - zero_point[e]) * scale[e]).T        offs[e - 1] <= t < offs[e]

`offs` is where each expert's tokens end, as `torch._grouped_mm` has it; an expert may have none. Tokens from offs[-1] on belong
to nobody, and what stands in their rows is undefined. Without `offs` each expert has as many tokens: (E, M, K) x (E, N, K).

Legend: T tokens of all experts, E experts, N output channels, K input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MisfitError
from ..layouts import Spec
from ..layouts.base import Packed
from .linear import act_values, weight_values
from .registry import case_of, pick


def grouped(x: Tensor, packed: Packed, spec: Spec, offs: Tensor | None = None) -> Tensor:
    """Matrix products by expert.

    Args:
        x: (T, K) sorted by expert, with offs; or (E, M, K) without. Any float dtype. packed, spec: the weights (E, N, K).
        offs: (E,), int32, not decreasing: where each expert's tokens end.

    Returns:
        (T, N), or (E, M, N), in x's dtype.

    Raises:
        MisfitError: shapes that do not go together.
    """
    wanted = (*spec.shape[:1], "M", spec.shape[-1]) if offs is None else ("T", spec.shape[-1])
    if len(spec.shape) != 3 or x.dim() != len(wanted) or x.shape[-1] != spec.shape[-1]:
        raise MisfitError(
            f"grouped wants x of shape {wanted} for weights (E, N, K) = {spec.shape}, got {tuple(x.shape)}."
        )
    if (
        x.shape[0] != spec.shape[0]
        if offs is None
        else (tuple(offs.shape) != spec.shape[:1] or offs.dtype != torch.int32)
    ):
        raise MisfitError(
            f"grouped wants {spec.shape[0]} experts, as int32 offsets or as the first axis of x, got x {tuple(x.shape)} and "
            f"offs {None if offs is None else (tuple(offs.shape), offs.dtype)}."
        )
    return pick(case_of("grouped", x, packed, spec)).run(x, packed, spec, offs)


def reference(
    x: Tensor, packed: Packed, spec: Spec, offs: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The meaning of grouped: every token times every expert, its own kept; `dtype` is what it computes in."""
    values, w_ENK = act_values(x, packed, spec, dtype), weight_values(packed, spec, dtype)
    if offs is None:
        return (values @ w_ENK.mT).to(x.dtype)
    expert_T = torch.searchsorted(offs, torch.arange(x.shape[0], device=x.device, dtype=offs.dtype), right=True)
    y_TN = values.new_zeros((x.shape[0], spec.shape[-2]))
    for e, w_NK in enumerate(w_ENK):
        y_TN = torch.where((expert_T == e)[:, None], values @ w_NK.T, y_TN)
    return y_TN.to(x.dtype)
