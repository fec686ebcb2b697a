"""The grid of a quantized tensor: its scales and zero points opened up, ready to encode and decode.

    qdata = nearest(x / scale + zero_point)        value = (qdata - zero_point) * scale

`quantize` makes one for a whole tensor. Methods that choose one column after the other (GPTQ) take `grid_of_parts`: the same
bytes come out whether a weight is encoded at once or column by column, for every format, because it is the same grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .element import Element
from .format import Format


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What encoding needs, shaped (..., 1, blocks, 1) to broadcast against the blocks.

    Args:
        element: of the codes. by: what a step is worth. inverse: its reciprocal where x / by would differ in the last bit.
        offset: the zero points. integer_offset: they are whole, so that x is rounded before they are added.
    """

    element: Element
    by: Tensor
    inverse: Tensor | None
    offset: Tensor | None
    integer_offset: bool

    def map(self, function: Callable[[Tensor], Tensor]) -> Grid:
        """The grid with `function` applied to each tensor."""
        inverse, offset = (None if t is None else function(t) for t in (self.inverse, self.offset))
        return dataclasses.replace(self, by=function(self.by), inverse=inverse, offset=offset)

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows of blocks."""
        return self.map(lambda tensor: tensor[rows])

    def encode(self, blocks: Tensor, noise: Tensor | None = None) -> Tensor:
        """The nearest codes; with noise in [0, 1) rounded up or down at random."""
        scaled = blocks / self.by if self.inverse is None else blocks * self.inverse
        if self.offset is not None:
            scaled = (scaled.round_() if self.integer_offset and noise is None else scaled).add_(self.offset)
        return self.element.encode(scaled) if noise is None else self.element.encode_stochastic(scaled, noise)

    def decode(self, qdata: Tensor) -> Tensor:
        """The values of codes, float32."""
        value = self.element.decode(qdata)
        return (value - self.offset if self.offset is not None else value) * self.by


def has_integer_zero_point(fmt: Format) -> bool:
    """Whether the zero point is stored as an integer."""
    return fmt.zero_point in ("int8", "uint8", "int32")


def grid_of(
    scale: Tensor,
    inverse: Tensor | None,
    zero_point: Tensor | None,
    fmt: Format,
    blocks: tuple[int, int],
    *,
    reciprocal: bool,
) -> Grid:
    """A grid over blocks (rows, bn, columns, bk), from one scale (and zero point) for each of the (rows, columns) blocks.

    Args:
        scale: the float32 values that the stored scales read back as. inverse: their reciprocals, where the format computes them
            in an order of its own. zero_point: as stored. fmt: the format. blocks: (rows, columns), counted in blocks.
        reciprocal: the rule of the scale wants x * (1 / scale).
    """
    shape = (blocks[0], 1, blocks[1], 1)
    if inverse is None and (reciprocal or fmt.scale in ("e4m3", "e8m0") or fmt.nested is not None):
        inverse = scale.reciprocal()
    return Grid(
        element=fmt.element,
        by=scale.reshape(shape),
        inverse=None if inverse is None else inverse.reshape(shape),
        offset=None if zero_point is None else zero_point.to(torch.float32).reshape(shape),
        integer_offset=has_integer_zero_point(fmt),
    )
