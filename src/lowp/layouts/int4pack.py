"""The layouts of torch's int4 products: tinygemm's tiles on CUDA, blocks of output channels on the CPU.

    qdata            codes + 8, in the order that torch's own packing gives
    scale_and_zero   bf16 (K / g, N, 2): scale, and the zero in units of the value, z = -zero_point * scale
    zero_point       as it was: z is rounded to bf16, so the original stays beside it

    value = (code - 8) * scale + z

torch packs and offers no way back, and its order depends on the machine (AVX2 or AVX-512 registers, CUDA fragments). The way
back is found by asking: a tile that holds its own indices, one hexadecimal digit at a time, is packed, and the digits that
come out say where every code went.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..numerics import Format, Parts
from ..numerics.bits import unpack_bits
from .base import Layout, Packed, Spec

_GROUPS = (32, 64, 128, 256)
_INNER_K_TILES = 8  # 16 columns each: one int32 load a thread brings 8 codes


def _pack_cpu(codes_NK: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(codes_NK.to(torch.int32), 1)


def _pack_cuda(codes_NK: Tensor) -> Tensor:
    high_nibble_first = (codes_NK[:, ::2] << 4) | codes_NK[:, 1::2]
    return torch._convert_weight_to_int4pack(high_nibble_first.contiguous(), _INNER_K_TILES)


@dataclass(frozen=True, kw_only=True)
class _Tiles:
    """How one device packs: its tile and its packing function."""

    device: str
    rows: int
    columns: int
    pack: Callable[[Tensor], Tensor]
    packed_shape: Callable[[int, int], tuple[int, ...]]
    dtype: torch.dtype


_CPU = _Tiles(
    device="cpu", rows=64, columns=32, pack=_pack_cpu, packed_shape=lambda n, k: (n, k // 2), dtype=torch.uint8
)
_CUDA = _Tiles(
    device="cuda", rows=8, columns=16 * _INNER_K_TILES, pack=_pack_cuda, dtype=torch.int32,
    packed_shape=lambda n, k: (n // 8, k // (16 * _INNER_K_TILES), 32, _INNER_K_TILES // 2),
)  # fmt: skip


@functools.cache
def _order(tiles: _Tiles) -> tuple[int, ...]:
    """For each nibble of a packed tile, the index row * columns + column of the code that it holds."""
    with _disable_current_modes(), torch.no_grad():
        index = torch.arange(tiles.rows * tiles.columns, device=tiles.device).view(tiles.rows, tiles.columns)
        found = torch.zeros(index.numel(), dtype=torch.int64, device=tiles.device)
        for digit in range(3):  # 16**3 = 4096 codes and more
            codes = ((index >> (4 * digit)) & 15).to(torch.uint8)
            found += unpack_bits(tiles.pack(codes).contiguous().view(torch.uint8).flatten(), 4, index.numel()).to(
                torch.int64
            ) << (4 * digit)
        return tuple(found.tolist())


def _to_tiles(codes_NK: Tensor, tiles: _Tiles) -> Tensor:
    rows, columns = codes_NK.shape
    return (
        codes_NK.view(rows // tiles.rows, tiles.rows, columns // tiles.columns, tiles.columns)
        .transpose(1, 2)
        .flatten(2)
    )


def _unpack_codes(packed: Tensor, shape: tuple[int, ...], tiles: _Tiles) -> Tensor:
    rows, columns = shape
    nibbles = unpack_bits(packed.contiguous().view(torch.uint8).flatten(), 4, rows * columns)
    nibbles = nibbles.view(rows // tiles.rows, columns // tiles.columns, tiles.rows * tiles.columns)
    order = torch.tensor(_order(tiles), device=packed.device)
    codes = torch.empty_like(nibbles)
    codes[..., order] = nibbles
    return codes.unflatten(-1, (tiles.rows, tiles.columns)).transpose(1, 2).reshape(rows, columns)


def codes_of_tinygemm(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The codes 0 to 15 (N, K) of tinygemm's tiles; packed: int32 on CUDA, as the layout "tinygemm" has it."""
    return _unpack_codes(packed, shape, _CUDA)


def _pack(parts: Parts, spec: Spec, tiles: _Tiles) -> Packed:
    scale = parts.scale
    assert scale is not None
    zero = (
        torch.zeros_like(scale)
        if parts.zero_point is None
        else (-parts.zero_point.float() * scale.float()).to(scale.dtype)
    )
    packed = {
        "qdata": tiles.pack((parts.qdata + 8).to(torch.uint8)),
        "scale_and_zero": torch.stack((scale.t(), zero.t()), dim=-1).contiguous(),
    }
    return packed | parts.replace(scale=None).tensors() | {"qdata": packed["qdata"]}


def _unpack(packed: Packed, spec: Spec, tiles: _Tiles) -> Parts:
    kept = {name: tensor for name, tensor in packed.items() if name != "scale_and_zero"}
    codes = _unpack_codes(packed["qdata"], spec.shape, tiles)
    return Parts.of(
        kept | {"qdata": codes.view(torch.int8) - 8, "scale": packed["scale_and_zero"][..., 0].t().contiguous()}
    )


def _why_not(fmt: Format, shape: tuple[int, ...], device: str, tiles: _Tiles) -> str:
    group = fmt.block.removeprefix("1x")
    if fmt.element.name != "int4" or fmt.scale != "bf16" or not group.isdigit() or int(group) not in _GROUPS:
        return f"wants int4 with a bf16 scale for 32, 64, 128 or 256 elements, got {fmt}"
    if len(shape) != 2 or shape[0] % tiles.rows or shape[1] % tiles.columns or shape[1] % int(group):
        return f"wants a matrix in tiles of {tiles.rows} x {tiles.columns}, got {tuple(shape)}"
    return ""


def _layout(name: str, about: str, tiles: _Tiles) -> Layout:
    return Layout(
        name=name,
        about=about,
        device=tiles.device,
        pack=functools.partial(_pack, tiles=tiles),
        unpack=functools.partial(_unpack, tiles=tiles),
        why_not=functools.partial(_why_not, tiles=tiles),
    )


LAYOUTS = (
    _layout("int4pack_cpu", "torch's int4 order on this CPU: blocks of 64 output channels", _CPU),
    _layout("tinygemm", "torch's int4 order on CUDA: tiles of 8 x 128 in tensor-core fragments", _CUDA),
)
