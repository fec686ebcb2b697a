"""The layout of Hopper's mixed product: codes in the order in which the lanes of a warpgroup feed them to the tensor cores.

    qdata    uint8 (..., N/64, K/64, 512 * bits): units of 64 x 64 codes, those of 64 rows one after another along K
    scale    of groups of columns: (..., N/64, K/group, 64), the 64 rows of a group side by side; of rows or the tensor: as it was
    others   zero_point as scale; the rest as in `Parts`

N is filled up to a multiple of 64 with zero codes. Inside a unit, the lane 32 w + 4 g + t of a warpgroup holds, for each step of
16 columns, four pairs of neighbours (wgmma's A operand, PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"):

    pair 0: row 16 w + g, columns 2t, 2t + 1       pair 1: row 16 w + g + 8
    pair 2: row 16 w + g, columns 2t + 8, 2t + 9   pair 3: row 16 w + g + 8

A width of b bits is stored in planes of 8, 4, 2 and 1 bits (5 = 4 + 1, low bits first), each a run of 32-bit words by lane. A
word of a plane of w bits holds 16 / w pairs: pair i has its first code at bit w * i and its second at bit 16 + w * i, so that one
mask brings both to the two halves of a register, where a magic number makes floats of them. For a codebook of 4 bits the two
codes of a pair share a byte instead: together they are an index into a table of pairs.

A slice of whole units of 64 rows is a slice of each tensor, and so is a slice of the axes before the matrix (experts).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..numerics import Format, Parts
from ..numerics.element import Element
from .base import Layout, Packed, Spec
from .tiled import by_group, cut_tiles, planes, tile_scales, untile_scales, why_not_tiles

UNIT = 64  # rows and columns
_LANES = 128  # of a warpgroup
_PAIRS = 16  # of a lane in a unit


def _places(element: Element, width: int) -> tuple[int, int]:
    """(between pairs, between the two codes of a pair), in bits, inside a 32-bit word of a plane."""
    return (8, 4) if element.kind == "codebook" else (width, 16)


def _to_lanes(codes: Tensor) -> Tensor:
    """(..., 64 n, 64 k) -> (..., n, k, 128 lanes, 16 pairs, 2)."""
    rows, columns = codes.shape[-2] // UNIT, codes.shape[-1] // UNIT
    # rows: warp, 8 rows on or not, g; columns: step, 8 columns on or not, t, first or second
    split = codes.unflatten(-1, (columns, 4, 2, 4, 2)).unflatten(-6, (rows, 4, 2, 8))
    # axes from the end: rows -9, warp -8, r8 -7, g -6, columns -5, step -4, k8 -3, t -2, e -1
    lead = list(range(split.dim() - 9))
    n, warp, r8, g, k, step, k8, t, e = range(split.dim() - 9, split.dim())
    ordered = split.permute(*lead, n, k, warp, g, t, step, k8, r8, e)
    return ordered.reshape(*ordered.shape[:-7], _LANES, _PAIRS, 2)


def _from_lanes(lanes: Tensor) -> Tensor:
    split = lanes.unflatten(-2, (4, 2, 2)).unflatten(-5, (4, 8, 4))
    lead = list(range(split.dim() - 9))
    n, k, warp, g, t, step, k8, r8, e = range(split.dim() - 9, split.dim())
    ordered = split.permute(*lead, n, warp, r8, g, k, step, k8, t, e)
    return ordered.reshape(*ordered.shape[:-9], ordered.shape[-9] * UNIT, ordered.shape[-5] * UNIT)


def _pack_plane(values: Tensor, width: int, element: Element) -> Tensor:
    """(..., 128, 16, 2) values of one plane -> (..., 512 * width) bytes."""
    if width == 8:  # pair 2 p + h of the word p: bytes h and h + 2
        words = values.unflatten(-2, (8, 2)).transpose(-1, -2).flatten(-2)  # (..., 128, 8 words, 4 bytes)
        return (
            words.unflatten(-2, (2, 4)).transpose(-3, -4).flatten(-4)
        )  # halves of 16 bytes a lane, one after the other
    pairs = values.unflatten(-2, (-1, 16 // width))  # (..., 128, words, pairs of a word, 2)
    between_pairs, between_codes = _places(element, width)
    word = torch.zeros((*pairs.shape[:-2], 4), dtype=torch.uint8, device=values.device)
    for i in range(pairs.shape[-2]):
        for e in range(2):
            at = between_pairs * i + between_codes * e
            word[..., at // 8] |= pairs[..., i, e] << (at % 8)
    return word.flatten(-3)


def _unpack_plane(stream: Tensor, width: int, element: Element) -> Tensor:
    if width == 8:
        words = stream.unflatten(-1, (2, _LANES, 4, 4)).transpose(-3, -4).flatten(-3, -2)  # (..., 128, 8, 4)
        return words.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-3, -2)
    word = stream.unflatten(-1, (_LANES, width, 4))
    between_pairs, between_codes = _places(element, width)
    starts = [between_pairs * i for i in range(16 // width)]
    pairs = [
        torch.stack([word[..., at // 8] >> (at % 8) & (2**width - 1) for at in (start, start + between_codes)], dim=-1)
        for start in starts
    ]
    return torch.stack(pairs, dim=-2).flatten(-3, -2)


def _pack_codes(codes: Tensor, element: Element) -> Tensor:
    lanes = _to_lanes(torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % UNIT)))
    out, low = [], 0
    for width in planes(element.bits):
        out.append(_pack_plane((lanes >> low) & (2**width - 1) if width < 8 else lanes, width, element))
        low += width
    return torch.cat(out, dim=-1)


def _unpack_codes(qdata: Tensor, element: Element, rows: int) -> Tensor:
    lanes, at, low = torch.zeros((), dtype=torch.uint8, device=qdata.device), 0, 0
    for width in planes(element.bits):
        lanes = lanes | _unpack_plane(qdata[..., at : at + 512 * width], width, element) << low
        at, low = at + 512 * width, low + width
    return _from_lanes(lanes)[..., :rows, :]


def _pack(parts: Parts, spec: Spec) -> Packed:
    fmt = spec.weight
    packed = parts.tensors() | {"qdata": _pack_codes(fmt.element.to_codes(parts.qdata), fmt.element)}
    if by_group(fmt):
        packed |= {name: tile_scales(packed[name], UNIT) for name in ("scale", "zero_point") if name in packed}
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _unpack(packed: Packed, spec: Spec) -> Parts:
    fmt, rows = spec.weight, spec.shape[-2]
    parts = dict(packed)
    if by_group(fmt):
        parts |= {name: untile_scales(packed[name], rows) for name in ("scale", "zero_point") if name in packed}
    return Parts.of(
        parts | {"qdata": fmt.element.from_codes(_unpack_codes(packed["qdata"], fmt.element, rows).contiguous())}
    )


def _why_not(fmt: Format, shape: tuple[int, ...], device: str) -> str:
    if fmt.element.kind == "codebook" and fmt.element.bits != 4:
        return f"wants codebooks of 4 bits, got {fmt.element.name}"
    refused = why_not_tiles(fmt, shape, UNIT)
    if refused or not by_group(fmt):
        return refused
    rows, columns = fmt.block_dims(shape)
    if rows != 1 or columns % 16 or (UNIT % columns and columns % UNIT):
        return f"wants groups of 16, 32 or multiples of {UNIT} columns of one row, got {fmt}"
    return ""


LAYOUTS = (
    Layout(
        name="fragments",
        about="units of 64 x 64 codes in the order of Hopper's tensor-core registers",
        pack=_pack,
        unpack=_unpack,
        why_not=_why_not,
        cut=functools.partial(cut_tiles, unit=UNIT),
        unit=UNIT,
    ),
)
