"""How the 8-bit product is cut: what a tiling is, which one suits a case by rule, and when torch's product is the faster one.

    few tokens    the weight is the left operand, tiles are small, and programs share the columns until the GPU is full
    many          the largest tiles that keep all multiprocessors busy; or torch's own product

Legend: M tokens, N rows of the weight, K columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

COUNTERS = 2048  # at most, of tiles whose columns are shared out


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut.

    Args:
        bm, bn, bk: tokens, rows of the weight and columns of a tile.
        split: programs that share a tile's columns; it divides K / bk. swap: the weight is the left operand.
        warps, stages: of a program. group: tiles of tokens that follow one another.
    """

    bm: int = 16
    bn: int = 64
    bk: int = 256
    split: int = 1
    swap: bool = True
    warps: int = 4
    stages: int = 4
    group: int = 8

    @property
    def shared(self) -> int:
        """Bytes of shared memory that the stages take."""
        return self.stages * self.bk * (self.bm + self.bn)


_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 120: 99}  # KiB that one program may have, by architecture
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}


def choose(tokens: int, rows: int, columns: int, sm: int, kind: str, dtype: torch.dtype) -> Tiling | None:
    """The tiling of a product, or None for torch's own.

    Args:
        tokens, rows, columns: M, N, K. sm: compute capability times ten.
        kind: "int8", "e4m3" (scales after the sum) or "blocks" (a scale for each 128 columns). dtype: of the result.
    """
    if tokens > 64 and by_torch(tokens, rows, columns, sm, kind, dtype):
        return None
    return tiling(tokens, rows, columns, sm, kind)


def torch_can(rows: int, columns: int, sm: int, kind: str, dtype: torch.dtype) -> bool:
    """Whether torch has the product, and can write `dtype`."""
    if kind == "int8":
        return rows % 8 == 0 and columns % 8 == 0
    if kind == "blocks":
        return sm == 90 and dtype == torch.bfloat16 and columns % 512 == 0
    return dtype == torch.bfloat16 and sm >= 89


def by_torch(tokens: int, rows: int, columns: int, sm: int, kind: str, dtype: torch.dtype) -> bool:
    """Whether torch's product is the faster one at many tokens."""
    if not torch_can(rows, columns, sm, kind, dtype):
        return False
    if (
        kind == "int8"
    ):  # torch's int32 sums and a pass to scale them took 1.4 times as long as one launch of ours, on an H100
        return sm < 90 and tokens > 256
    many = (2 if columns <= 8192 else 1) * _PROCESSORS.get(sm, 132)  # tiles, of which a processor holds two
    return kind == "blocks" or sm < 90 or _tiles(tokens, rows, 64) > many


def _tiles(tokens: int, rows: int, side: int) -> int:
    """How many square tiles a product has."""
    return -(-tokens // side) * -(-rows // side)


@functools.lru_cache(maxsize=65536)
def tiling(tokens: int, rows: int, columns: int, sm: int, kind: str) -> Tiling:
    """Triton's tiling, by rule: few tokens, much of the weight in flight; many, the largest tiles that keep the GPU busy."""
    processors = _PROCESSORS.get(sm, 132)
    few = _few(tokens, rows, columns, 2 * processors) if sm >= 90 and kind != "blocks" else None
    if few:
        made = few
    elif tokens <= 64 or (sm >= 90 and _tiles(tokens, rows, 64) <= 2 * processors):
        bm = min(64, max(16, triton.next_power_of_2(tokens)))
        narrow = kind == "blocks" or bm == 64  # two programs fit a processor
        made = Tiling(bm=bm, bn=64, bk=128 if narrow else 256, stages=6 if narrow else 4)
    elif sm >= 90 and _tiles(tokens, rows, 128) <= processors:
        made = Tiling(bm=128, bn=128, bk=128, swap=False, warps=8 if kind == "blocks" else 4, stages=4)
    elif sm < 90 or kind == "blocks":
        made = Tiling(
            bm=64 if tokens <= 128 else 128, bn=128, bk=128, swap=False, warps=8 if tokens > 128 else 4, stages=4
        )
    else:
        made = Tiling(bm=128, bn=256, bk=128, swap=False, warps=8, stages=4)
    return fit(made, tokens, rows, columns, sm)


def _few(tokens: int, rows: int, columns: int, programs: int) -> Tiling | None:
    """The smallest tile of which so many programs make up the product, by two or more for each tile at best; None: no tile is so
    large. It is the time of one program that counts then. Over many columns 64 tokens were 5 % faster than 32."""
    for bm, least in ((16, 2), (32, 2), (32, 1), (64, 1)):
        if bm == 32 and tokens > 32 and columns > 4096:
            continue
        tiles = -(-tokens // bm) * -(-rows // 64)
        if bm <= max(16, triton.next_power_of_2(tokens)) and least * tiles <= programs:
            return Tiling(bm=bm, bn=64, bk=128 if bm == 64 else 256, stages=6 if bm == 64 else 4)
    return None


def fit(made: Tiling, tokens: int, rows: int, columns: int, sm: int) -> Tiling:
    """The tiling made to fit K and the shared memory; the columns of small tiles are shared out where that ends sooner."""
    bk = made.bk
    while bk > 32 and columns % bk and columns % (bk // 2) < columns % bk:
        bk //= 2
    stages = made.stages
    room = _SHARED.get(sm, 227 if sm >= 90 else 99) * 1024 - 2048
    while stages > 2 and stages * bk * (made.bm + made.bn) > room:
        stages -= 1
    made = replace(made, bk=bk, stages=stages)
    tiles, steps = -(-tokens // made.bm) * -(-rows // made.bn), columns // bk
    if sm >= 90 and made.swap:  # as many programs as work at once, two to a processor: measured on an H200
        most = 2 * _PROCESSORS.get(sm, 132) // tiles if columns % bk == 0 else 1
        fitting = [split for split in range(1, 17) if split <= most and steps % split == 0 and steps // split >= 4]
        return replace(made, split=max(fitting, default=1))
    resident = max(1, min(room // made.shared, 16 // made.warps, 4))
    slots = _PROCESSORS.get(sm, 132) * resident
    # The program that adds holds its own sums and those of another.
    twice = 2 * made.bm * made.bn // (32 * made.warps) <= 128  # registers of a thread
    if columns % bk or not twice or tiles > min(COUNTERS, 2 * slots):
        return made
    fitting = [split for split in range(1, 17) if steps % split == 0 and (split == 1 or steps // split >= 4)]
    sums = 44 * made.bm  # what it costs to add the sums of others, in columns, measured

    def cost(split: int) -> float:
        return columns / split * -(-tiles * split // slots) + (sums + 64 * split if split > 1 else 0)

    return replace(made, split=min(fitting, key=cost))


_SHAPES = (  # bm, bn, bk, swap, warps, stages
    (16, 64, 256, True, 4, 4), (16, 64, 128, True, 4, 6), (32, 64, 256, True, 4, 4), (32, 64, 128, True, 4, 6),
    (64, 64, 128, True, 4, 6), (64, 32, 256, False, 4, 4), (64, 32, 128, False, 4, 6), (128, 64, 128, False, 4, 4),
    (64, 128, 128, False, 4, 4), (128, 128, 128, False, 4, 4), (128, 128, 128, False, 8, 4), (128, 256, 128, False, 8, 4),
)  # fmt: skip


def candidates(tokens: int, rows: int, columns: int, sm: int, kind: str) -> list[Tiling]:
    """Tilings worth asking about for a batch; the columns of small tiles shared out in every way that fills no second round."""
    found: dict[Tiling, None] = {}
    for bm, bn, bk, swap, warps, stages in _SHAPES:
        if bm > max(16, 2 * tokens) or tokens > 32 * bm or (kind == "blocks" and bk > 128):
            continue
        made = fit(Tiling(bm=bm, bn=bn, bk=bk, swap=swap, warps=warps, stages=stages), tokens, rows, columns, sm)
        tiles, steps = -(-tokens // bm) * -(-rows // bn), columns // made.bk
        most = min(COUNTERS, 4 * _PROCESSORS.get(sm, 132)) // tiles if swap and columns % made.bk == 0 else 1
        splits = {made.split, *(split for split in (1, 2, 4, 8, 16) if split <= most and steps % split == 0)}
        found |= dict.fromkeys(replace(made, split=split) for split in sorted(splits))
    return list(found)
