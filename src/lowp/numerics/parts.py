"""Parts: the plain tensors of one quantized tensor, under the names the ecosystem loads.

    value = (qdata - zero_point) * scale

For a tensor of shape (..., N, K) and blocks of (bn, bk) elements:

    qdata             (..., N, K)          unpacked, in the element's dtype (`Element.dtype`)
    scale             (..., N/bn, K/bk)    in the scale's dtype; granularity is this shape, nothing else
    zero_point        as scale, or None
    scale_scale       if the scale is itself quantized: the scale of its blocks; scale_zero_point likewise
    act_rotation      (K,) or None: signs; the activation is rotated by them first (`hadamard.py`)
    act_pre_scale     (K,) or None: the activation is multiplied by it before it is quantized (AWQ, SmoothQuant)
    act_scale         () or None: a static scale of the activation
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The tensors of one quantized tensor; the page above gives their shapes."""

    qdata: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    scale_scale: Tensor | None = None
    scale_zero_point: Tensor | None = None
    act_rotation: Tensor | None = None
    act_pre_scale: Tensor | None = None
    act_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name, in a fixed order.

        >>> list(Parts(qdata=torch.zeros(2, 2), scale=torch.ones(2, 1)).tensors())
        ['qdata', 'scale']
        """
        named = ((name, getattr(self, name)) for name in PART_NAMES)
        return {name: tensor for name, tensor in named if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Parts:
        """The inverse of `tensors`; names that are not parts are an error."""
        return cls(**tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Parts:
        """The parts with `function` applied to each tensor that is there."""
        return Parts.of({name: function(tensor) for name, tensor in self.tensors().items()})

    def replace(self, **tensors: Tensor | None) -> Parts:
        """The parts with some tensors exchanged."""
        merged = self.tensors() | tensors
        return Parts.of({name: tensor for name, tensor in merged.items() if tensor is not None})


PART_NAMES = tuple(field.name for field in dataclasses.fields(Parts))
