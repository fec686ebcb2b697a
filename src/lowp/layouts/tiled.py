"""What layouts in tiles of rows have in common: planes of bits, the scales of groups beside one another, cuts, and what fits.

A tile, or unit, is so many rows, whole along K. Tensors have an axis more than the matrix, tiles and what is in a tile, so that
a slice of whole tiles is a slice of each tensor, in place, and so is a slice of the axes before the matrix (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MisfitError
from ..numerics import Format
from .base import Packed, Spec
from .plain import cut_part


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes that hold so many bits, the lowest first.

    >>> planes(7)
    (4, 2, 1)
    """
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def by_group(fmt: Format) -> bool:
    """Whether groups of columns have scales of their own."""
    return fmt.block not in ("row", "tensor")


def tile_scales(per_block: Tensor, unit: int) -> Tensor:
    """(..., N, G) -> (..., N/unit, G, unit): scales of groups of columns, those of a unit of rows side by side."""
    raw = per_block.view(torch.uint8) if per_block.element_size() == 1 else per_block
    padded = torch.nn.functional.pad(raw, (0, 0, 0, -raw.shape[-2] % unit))
    return padded.unflatten(-2, (-1, unit)).mT.contiguous().view(per_block.dtype)


def untile_scales(tiled: Tensor, rows: int) -> Tensor:
    """The inverse, for so many rows."""
    raw = tiled.view(torch.uint8) if tiled.element_size() == 1 else tiled
    return raw.mT.flatten(-3, -2)[..., :rows, :].contiguous().view(tiled.dtype)


def cut_tiles(
    packed: Packed, spec: Spec, axis: int, start: int, stop: int, *, unit: int, by_rows: tuple[str, ...] = ()
) -> Packed:
    """`Layout.cut` for tiles of `unit` rows.

    Args:
        by_rows: names of tensors (..., N/unit, unit) that have no columns.

    Raises:
        MisfitError: the cut goes through a tile.
    """
    rows, axis = spec.shape[-2], axis % len(spec.shape) - len(spec.shape)
    if axis == -1 or (axis == -2 and (start % unit or (stop % unit and stop != rows))):
        raise MisfitError(
            f"a cut [{start}:{stop}] of axis {axis} of {spec.scheme} {spec.shape} splits tiles of {unit} rows, whole along K, "
            f"in the layout {spec.layout}: cut axis -2 at multiples of {unit}, or call .to_layout('plain') first."
        )
    tiled = {"qdata", *by_rows, *(("scale", "zero_point") if by_group(spec.weight) else ())}
    first, last = (start, stop) if axis < -2 else (start // unit, -(-stop // unit))
    return {
        name: tensor.narrow(axis if name in by_rows else axis - 1, first, last - first)
        if name in tiled
        else cut_part(name, tensor, spec, axis, start, stop)
        for name, tensor in packed.items()
    }


def why_not_tiles(fmt: Format, shape: tuple[int, ...], columns: int) -> str:
    """ "" or why tiles of so many columns do not hold a matrix of codes, whatever its scales."""
    if fmt.is_identity:
        return f"wants codes of at most 8 bits, got {fmt}"
    if len(shape) < 2 or shape[-1] % columns or 0 in shape:
        return f"wants matrices with K in multiples of {columns}, got {tuple(shape)}"
    if not by_group(fmt):
        return "" if fmt.nested is None else f"wants scales of rows that are floats, got {fmt}"
    try:
        fmt.block_dims(shape)
    except MisfitError as error:
        return str(error)
    return ""
