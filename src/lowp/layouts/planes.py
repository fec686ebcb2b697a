"""The layout of the CPU's products: planes of bits, in tiles of 16 rows and 32 columns.

    qdata       uint8 (..., N/16, K/32, 64 * bits): tiles of 16 x 32 codes, those of 16 rows one after another along K
    scale       of groups of columns: (..., N/16, K/group, 16), 16 rows of a group side by side; of rows or the tensor: as it was
    row_sum     float32 (..., N/16, 16), the sum over K of each row's values: only where the activation has a zero point
    others      zero_point as scale; the rest as in `Parts`

N is filled up to a multiple of 16 with zero codes. A width of b bits is stored in planes of 4, 2 and 1 bits (5 = 4 + 1, low
bits first; 8 is a plane of bytes). In a plane of w bits a tile is w lines of 64 bytes. Byte 4 r + c of line l holds, from its
lowest bits up, row r and column c of the quads l, l + w, l + 2 w ... (a quad is 4 columns): one shift and one mask make of a
line 16 rows x 4 columns of bytes, the operand of the dot product instructions of x86 and ARM, whatever the width.

Signed integers are stored with their sign bit flipped, so that codes count up from the smallest value: those instructions want
unsigned bytes on one side, and the difference is a constant times the sum of x.

A slice of whole tiles of 16 rows is a slice of each tensor, and so is a slice of the axes before the matrix (experts).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..numerics import Format, Parts, dequantize
from ..numerics.element import Element
from .base import Layout, Packed, Spec
from .pages import on_huge_pages
from .tiled import by_group, cut_tiles, planes, tile_scales, untile_scales, why_not_tiles

ROWS, COLUMNS = 16, 32  # of a tile
_QUADS = COLUMNS // 4
_AT_ONCE = 1 << 23  # codes that are moved at a time: what that takes in between is some times their bytes


def _flip(codes: Tensor, element: Element) -> Tensor:
    """Codes that count up from the smallest value, and back."""
    return codes ^ (1 << (element.bits - 1)) if element.kind == "int" and element.signed else codes


def _rows_at_once(codes: Tensor, rows: int, unit: int) -> int:
    """How many rows of each matrix together have so many codes, of `codes` with so many; a multiple of `unit`."""
    return max(_AT_ONCE * rows // max(codes.numel(), 1) // unit, 1) * unit


def _pack_codes(codes: Tensor, element: Element) -> Tensor:
    pieces = codes.split(_rows_at_once(codes, codes.shape[-2], ROWS), dim=-2)
    return torch.cat([_pack_piece(piece, element) for piece in pieces], dim=-3)


def _pack_piece(codes: Tensor, element: Element) -> Tensor:
    padded = torch.nn.functional.pad(_flip(codes, element), (0, 0, 0, -codes.shape[-2] % ROWS))
    split = padded.unflatten(-1, (-1, _QUADS, 4)).unflatten(-4, (-1, ROWS))  # (..., n, 16, k, 8, 4)
    quads = split.movedim(-4, -2)  # (..., n, k, 8, 16, 4)
    out, low = [], 0
    for width in planes(element.bits):
        field = (quads >> low) & (2**width - 1) if width < 8 else quads
        parts = field.unflatten(-3, (-1, width))  # quad = part * width + line
        line = parts[..., 0, :, :, :].clone()
        for part in range(1, parts.shape[-4]):
            line |= parts[..., part, :, :, :] << (part * width)
        out.append(line.flatten(-3))
        low += width
    return torch.cat(out, dim=-1)


def _unpack_codes(qdata: Tensor, element: Element, rows: int) -> Tensor:
    pieces = qdata.split(_rows_at_once(qdata, qdata.shape[-3], 1), dim=-3)
    return torch.cat([_unpack_piece(piece, element) for piece in pieces], dim=-2)[..., :rows, :]


def _unpack_piece(qdata: Tensor, element: Element) -> Tensor:
    quads, at, low = torch.zeros((), dtype=torch.uint8, device=qdata.device), 0, 0
    for width in planes(element.bits):
        lines = qdata[..., at : at + 64 * width].unflatten(-1, (width, ROWS, 4))
        parts = [(lines >> (width * part)) & (2**width - 1) if width < 8 else lines for part in range(8 // width)]
        quads = quads | torch.stack(parts, dim=-4).flatten(-4, -3) << low
        at, low = at + 64 * width, low + width
    return _flip(quads.movedim(-2, -4).flatten(-3).flatten(-3, -2), element)


def _wants_sums(spec: Spec) -> bool:
    return spec.act is not None and spec.act.zero_point is not None


def _pack(parts: Parts, spec: Spec) -> Packed:
    fmt = spec.weight
    packed = parts.tensors() | {"qdata": _pack_codes(fmt.element.to_codes(parts.qdata), fmt.element)}
    if by_group(fmt):
        packed |= {name: tile_scales(packed[name], ROWS) for name in ("scale", "zero_point") if name in packed}
    if _wants_sums(spec):
        sums = dequantize(parts, fmt).sum(dim=-1)
        packed["row_sum"] = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % ROWS)).unflatten(-1, (-1, ROWS))
    return on_huge_pages({name: tensor.contiguous() for name, tensor in packed.items()})


def _unpack(packed: Packed, spec: Spec) -> Parts:
    fmt, rows = spec.weight, spec.shape[-2]
    parts = {name: tensor for name, tensor in packed.items() if name != "row_sum"}
    if by_group(fmt):
        parts |= {name: untile_scales(packed[name], rows) for name in ("scale", "zero_point") if name in packed}
    codes = _unpack_codes(packed["qdata"], fmt.element, rows)
    return Parts.of(parts | {"qdata": fmt.element.from_codes(codes.contiguous())})


def _why_not(fmt: Format, shape: tuple[int, ...], device: str) -> str:
    refused = why_not_tiles(fmt, shape, COLUMNS)
    if refused or not by_group(fmt):
        return refused
    rows, columns = fmt.block_dims(shape)
    if rows != 1 or (columns != 16 and columns % COLUMNS):
        return f"wants groups of 16 or multiples of {COLUMNS} columns of one row, got {fmt}"
    return ""


LAYOUTS = (
    Layout(
        name="planes",
        about="planes of bits in tiles of 16 x 32 codes, for the dot products of x86 and ARM",
        pack=_pack,
        unpack=_unpack,
        why_not=_why_not,
        cut=functools.partial(cut_tiles, unit=ROWS, by_rows=("row_sum",)),
        unit=ROWS,
    ),
)
