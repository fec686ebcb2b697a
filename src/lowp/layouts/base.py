"""The records of storage: `Spec`, what a packed tensor is; `Layout`, how it is packed.

Packed tensors travel as a dict of plain tensors by name, beside a Spec that holds strings and sizes only. So a packed weight
can be traced, saved and read without any class of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..numerics import Format, Parts, Scheme

Packed = dict[str, Tensor]


class Schemed:
    """What knows a scheme by its spelling, and so its formats."""

    scheme: str

    @property
    def weight(self) -> Format:
        """The weight's format."""
        return Scheme.parse(self.scheme).weight

    @property
    def act(self) -> Format | None:
        """The activation's format, None for weight-only."""
        return Scheme.parse(self.scheme).act


@dataclass(frozen=True, kw_only=True)
class Spec(Schemed):
    """What a packed tensor is.

    Args:
        scheme: spelling of the weight's format and, after "@", the activation's.
        layout: name of the layout.
        shape: (..., N, K), the shape that was quantized.
    """

    scheme: str
    layout: str
    shape: tuple[int, ...]

    def with_shape(self, shape: tuple[int, ...]) -> Spec:
        """The same with another shape."""
        return replace(self, shape=tuple(shape))

    def with_layout(self, layout: str) -> Spec:
        """The same in another layout."""
        return replace(self, layout=layout)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store the parts of a quantized tensor.

    Args:
        name: its spelling in reports, kernel tables and QTensor metadata.
        about: one line: what the order of the bytes is, and for which kernel.
        pack: parts and spec -> packed tensors by name.
        unpack: the inverse, bit for bit.
        why_not: format, shape and device type -> "" or one sentence why this layout cannot hold it.
        device: the device type that it is bound to, "" for any.
        cut: packed, spec, axis, start, stop -> views of the packed tensors that hold the elements [start, stop) along an axis of
            the quantized shape, a tensor that serves all of them being itself; a MisfitError says what would fit. None where
            only the whole can be read. A layout with a cut keeps the axes before the matrix as the first of each tensor, and
            after them the rows, or units of them.
        unit: rows that no cut parts.
    """

    name: str
    about: str
    pack: Callable[[Parts, Spec], Packed]
    unpack: Callable[[Packed, Spec], Parts]
    why_not: Callable[[Format, tuple[int, ...], str], str]
    device: str = ""
    cut: Callable[[Packed, Spec, int, int, int], Packed] | None = None
    unit: int = 1
