"""Products by expert of float8 operands with scales by row, on Hopper's tensor cores: one kernel for what training asks.

    y_TN[t]   = (a_TK[t] * a_scale_T[t]) @ (b_ENK[e] * b_scale_EN[e]).T         tokens of an expert are rows
    dw_ENK[e] = (a_NP[:, e] * a_scale_NE) @ (b_KP[:, e] * b_scale_KE).T         tokens of an expert are what is summed

As many programs as there are processors walk over the tiles of all experts. How many tiles an expert has is read on the device:
nothing waits for the host. Operands come through the copy engine, 128 codes of a row at a time, and zeros where a matrix ends.

A tile of tokens that holds the end of its group reads tokens of the next one, and writes them nowhere.

Legend: T tokens, E experts, N and K channels, P places of tokens in groups of multiples of 128; a tile is BM x BN, summed by BK.
"""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...numerics import Parts
from ...ops.registry import Kernel
from ..torch_.scaled_grouped_mm import scaled_grouped, why_not_rows
from . import interpreted
from .launch import begin, launch


@triton.jit
def _spans(offs_ptr, rows, N_TILES, E, LANES: tl.constexpr, BM: tl.constexpr, SUMS: tl.constexpr):
    """By expert: where its tokens begin and end, and how many tiles it and those before it have."""
    lane = tl.arange(0, LANES)
    end = tl.load(offs_ptr + lane, mask=lane < E, other=0)
    start = tl.load(offs_ptr + lane - 1, mask=(lane > 0) & (lane < E), other=0)
    height = tl.zeros_like(end) + rows if SUMS else end - start
    tiles = tl.where(lane < E, tl.cdiv(height, BM) * N_TILES, 0)
    return start, end, tiles, tl.cumsum(tiles, 0)


@triton.jit
def _place(
    tile, offs_ptr, T, N_TILES, K, E, b_down, b_right, SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Of a tile: its expert and corner; the expert's first row of y and its height; where a and b begin, and what is summed."""
    start, end, _tiles, below = _spans(offs_ptr, T, N_TILES, E, LANES, BM, SUMS)
    expert = tl.sum((below <= tile).to(tl.int32), 0)
    here = tile - tl.max(tl.where(below <= tile, below, 0), 0)
    mine = tl.arange(0, LANES) == expert
    start, end = tl.sum(tl.where(mine, start, 0), 0), tl.sum(tl.where(mine, end, 0), 0)
    if SUMS:
        height, base, low, high, down, right, row = T, expert * T, start, end, 0, 0, 0
    else:
        height, base, low, high, down, right, row = end - start, start, 0, K, expert * b_down, expert * b_right, start
    # tiles of GROUP rows of tiles follow one another, so that they find their operands in the cache
    first = here // (GROUP * N_TILES) * GROUP
    count = tl.minimum(tl.cdiv(height, BM) - first, GROUP)
    within = here % (GROUP * N_TILES)
    m, n = (first + within % count) * BM, within // count * BN
    return expert, m, n, base, height, row + m, down + n, right, low, high


@triton.jit(do_not_specialize=["T", "E"], do_not_specialize_on_alignment=["a_scale_ptr", "b_scale_ptr", "offs_ptr"])
def _grouped_kernel(
    a_desc, b_desc, y_desc, a_scale_ptr, b_scale_ptr, offs_ptr, y_ptr, T, N, K, E, b_down, b_right, programs,
    SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """y (T, N) summed over K, or with SUMS (E, T, N) summed over the places of each expert; K is unused then.

    b_down, b_right: rows and columns from one expert's matrix to the next, where b is a stack.
    """
    begin(EARLY)
    N_TILES = tl.cdiv(N, BN)
    _start, _end, tiles, _below = _spans(offs_ptr, T, N_TILES, E, LANES, BM, SUMS)
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), programs):
        expert, m, n, base, height, row, column, right, low, high = _place(
            tile, offs_ptr, T, N_TILES, K, E, b_down, b_right, SUMS, BM, BN, GROUP, LANES
        )
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(low, high, BK):
            acc = tl.dot(a_desc.load([row, k]), b_desc.load([column, right + k]).T, acc)
        inside, across = m + i < height, n + j < N
        a_scale = tl.load(a_scale_ptr + base + m + i, mask=inside, other=0.0)
        b_scale = tl.load(b_scale_ptr + expert * N + n + j, mask=across, other=0.0)
        y = (acc * a_scale[:, None] * b_scale[None, :]).to(tl.bfloat16)
        if m + BM <= height:  # by the copy engine; else number by number, for the next rows are another expert's
            y_desc.store([base + m, n], y)
        else:
            at = y_ptr + (base + m + i)[:, None].to(tl.int64) * N + (n + j)[None, :]
            tl.store(at, y, mask=inside[:, None] & across[None, :])


@dataclass(frozen=True)
class Tiling:
    """A tile is bm x bn, bk summed at once; `group` rows of tiles follow one another; warps and stages of a program."""

    bm: int = 128
    bn: int = 256
    bk: int = 128  # the 128 bytes that the copy engine swizzles
    group: int = 8
    warps: int = 8
    stages: int = 3  # 144 KiB of operands, beside 64 of the tile that is written


TILINGS = {"many": Tiling(), "few": Tiling(bm=64, stages=4, warps=4)}
_FEW = 64  # tokens of an expert on average, of which a larger tile would be half empty
_SHORT = 512  # places of an expert on average: with fewer to sum torch's product, which writes a tile beside the next, is faster


def choose(sums: bool, tokens: int, experts: int) -> Tiling | None:
    """The tiling by rule, None for torch's product: what was fastest on an H200 (16 to 128 experts, 512 to 131,072 tokens)."""
    if sums:
        return None if tokens <= _SHORT * experts else TILINGS["many"]
    return TILINGS["few" if tokens <= _FEW * experts else "many"]


def _run(a: Parts, b: Parts, offs: Tensor, scheme: str, dtype: torch.dtype, tiling: Tiling | None = None) -> Tensor:
    experts, device, sums = offs.shape[0], a.qdata.device, b.qdata.dim() == 2
    tiled = tiling or choose(sums, a.qdata.shape[1 if sums else 0], experts)
    if tiled is None and not interpreted():
        return scaled_grouped(a, b, offs, scheme, dtype)
    tiled = tiled or TILINGS["many"]
    rows, width, columns = a.qdata.shape[0], a.qdata.shape[1], b.qdata.shape[-2]
    shape = (experts, rows, columns) if sums else (rows, columns)
    if 0 in (rows, width, columns):
        return torch.zeros(shape, dtype=dtype, device=device)
    y = torch.empty(shape, dtype=torch.bfloat16, device=device)
    a_codes, (b_codes, down, right) = a.qdata.contiguous(), _matrix(b.qdata)
    a_scale, b_scale = _scales(a, sums), _scales(b, sums)
    lanes = max(16, triton.next_power_of_2(experts))
    descriptors = (
        _descriptor(a_codes, tiled.bm, tiled.bk), _descriptor(b_codes, tiled.bn, tiled.bk),
        _descriptor(y.view(-1, columns), tiled.bm, tiled.bn),
    )  # fmt: skip
    programs = _processors(device)
    args = (*descriptors, a_scale, b_scale, offs, y, rows, columns, width, experts, down, right, programs)
    key = ("grouped", tiled, sums, lanes, columns % 16, width % 16, _seen(down), _seen(right), device.index)
    constants = (sums, *astuple(tiled)[:4], lanes)
    launch(_grouped_kernel, key, (programs, 1, 1), args, lambda: constants, device, tiled.warps, tiled.stages, True)
    return y.to(dtype)


def _scales(parts: Parts, sums: bool) -> Tensor:
    """In float32; one expert's after the other's where tokens are summed, which is how `cast_groups` lays them."""
    assert parts.scale is not None
    scale = parts.scale.to(torch.float32)
    return (scale.t() if sums else scale).contiguous()


def _matrix(codes: Tensor) -> tuple[Tensor, int, int]:
    """b as one matrix, and how many rows and columns lie from one expert's to the next."""
    if codes.dim() == 2:
        return codes.contiguous(), 0, 0
    experts, rows, width = codes.shape
    each, long, one = codes.stride()
    if one == 1 and each < long and long % 16 == 0 and each >= -(-width // 128) * 128:  # beside one another
        return codes.as_strided((rows, long), (long, 1)), 0, each
    return codes.reshape(experts * rows, width), rows, 0


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, columns])


@functools.cache
def _processors(device: torch.device) -> int:
    return 3 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def _seen(size: int) -> int:
    """What Triton specializes an integer for."""
    return 1 if size == 1 else 16 if size % 16 == 0 else 0


KERNELS = (
    Kernel(
        op="grouped_product",
        name="grouped_product",
        rank=50,
        layout="",
        why_not=why_not_rows,
        run=_run,
        how=lambda case: "native: float8 tensor cores in Triton, all experts in one launch",
        about="float8 products by expert in Triton",
        cases=("e4m3/row@e4m3/row", "e4m3/row*e8m0@e4m3/row*e8m0"),
    ),
)
