"""Weights in 1 to 8 bits from the plain layout times bf16, fp16 or fp32: one tiled product for every element, batch and device.

    y_MN = x_MK @ ((qdata_NK - zero_point) * scale).T + bias_N

Where the scheme quantizes the activation too, x is quantized and dequantized first. A tile of codes is loaded as words, decoded
in registers and multiplied on tensor cores, so the weight is read from memory once, in its few bits. Scales of groups are applied
to the decoded weight; a scale of a row or of the tensor to the sums, where it costs nothing.

What depends on the batch M is decided by `choose`, by rule:

    M small     the weight is the left operand: its rows fill the instruction's 64 (16 on Ampere), a few tokens its 8 or 16
                columns. Few rows leave processors idle, so the columns are split, each split writes its sums, and a second
                kernel adds them in a fixed order: no atomics, the same bits each time.
    M medium    ordinary tiles, tokens on the left. The weight is decoded once for each tile of tokens.
    M large     the weight is decoded once to a workspace (`decode.py`), and torch's own product takes over.

The grouped form, y[t] = x[t] @ W[e(t)].T with the tokens sorted by expert, is the same kernel: each tile finds its expert from
the offsets on the device (`_expert_of`), so the host waits for nothing and a CUDA graph can hold it. A batch of matrices is the
form where each expert has as many tokens.

Legend: M tokens (T where they belong to experts), N output channels, K input channels, E experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...numerics import known_formats
from ...ops.how import decoded, float_units, short, with_activation
from ...ops.linear import act_values
from ...ops.registry import Case, Kernel, device_capability
from . import why_not_portable
from .decode import (
    Plan,
    codes_tile,
    decode,
    exact_in,
    groups_at,
    place,
    plan,
    read_scale,
    scaled,
    table_of,
    values,
    values_in,
)
from .decode import why_not as why_not_decoded
from .launch import begin
from .packed import computed_in, launch_packed, parts_of, register


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut.

    Args:
        bn, bm, bk: rows of the weight, tokens and columns of a tile, powers of two. split: parts that the columns are split in.
        weight_left: the weight is the left operand. warps, stages: of a block and of its pipeline.

    Raises:
        ValueError: fewer than 32 columns. Where codes are joined from bytes, Triton (3.6) gives each of the four threads of a row
            eight columns of an operand, however few the tile has, and the product of 16 is wrong without a word.
    """

    bn: int
    bm: int
    bk: int
    split: int = 1
    weight_left: bool = True
    warps: int = 4
    stages: int = 4

    def __post_init__(self) -> None:
        if self.bk < 32:
            raise ValueError(f"wants tiles of 32 columns or more, got bk={self.bk}: take a wider tile")


def _big(sm: int) -> bool:
    """A data center's chip: twice the shared memory of others, and more products for a byte."""
    return 90 <= sm < 120


def _most_tokens(sm: int) -> int:
    """Above so many, two passes over the weight cost less than a product at half the speed."""
    return 512 if _big(sm) else 256


def choose(tokens: int, rows: int, columns: int, sm: int, *, widest: int = 128, experts: int = 1) -> Tiling | None:
    """The tiling by rule; None: decode the weight once, then torch's own product.

    Args:
        tokens: of all experts together. rows, columns: N, K of one. sm: 90 for Hopper. widest: tile of columns.
    """
    each, big = -(-tokens // experts), _big(sm)
    if each > _most_tokens(sm):
        return None
    if each > 64:
        bm, bn = (128, 128) if each > 128 and big else (64, 128)
        return Tiling(bn=bn, bm=bm, bk=64, weight_left=False, warps=8 if bm == 128 else 4, stages=3)
    bm = 16 if each <= 16 else 32 if each <= 32 else 64
    bn = 64 if rows * experts >= 8192 or big else 32
    tiles = -(-rows // bn) * experts
    split = 1
    if experts == 1:  # two rounds of about 128 processors, and at least four tiles of columns a block
        while tiles * split < 256 and columns // (2 * split * widest) >= 4 and split < 16:
            split *= 2
    return Tiling(bn=bn, bm=bm, bk=widest, split=split, stages=4 if bm < 64 else 3)


# -- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _expert_of(offs_ptr: tl.tensor, tile: tl.tensor, M: tl.tensor, E: tl.constexpr, BM: tl.constexpr) -> tl.tensor:
    """(expert, its first token, how many it has, which of its tiles): experts of no tokens have no tile, and the tokens after
    the last offset are those of an expert E, whose results are zeros."""
    slots: tl.constexpr = triton.next_power_of_2(E + 1)
    e = tl.arange(0, slots)
    ends = tl.load(offs_ptr + e, mask=e < E, other=M)
    starts = tl.load(offs_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
    counts = tl.where(e <= E, ends - starts, 0)
    tiles = (counts + BM - 1) // BM
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    here = e == expert
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    return expert, tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, counts, 0), 0), tile - before


@triton.jit(do_not_specialize=["M", "TILES"])
def product(
    q_ptr: tl.tensor, x_ptr: tl.tensor, s_ptr: tl.tensor, z_ptr: tl.tensor, ss_ptr: tl.tensor, sz_ptr: tl.tensor,
    table_ptr: tl.tensor, bias_ptr: tl.tensor, offs_ptr: tl.tensor, y_ptr: tl.tensor,
    M: tl.tensor, TILES: tl.tensor, N: tl.tensor, C: tl.tensor, R: tl.tensor, SC: tl.tensor, NS: tl.tensor, SE: tl.tensor,
    NE: tl.tensor,
    F: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
    LEFT: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of the product, or of one split of it.

    M: all tokens where `offs` tells which are whose, else the tokens of each of the E matrices. TILES: of tokens. STEPS: tiles of
    columns of a split. The other sizes as in `Plan`. EXACT: 16 bits do (`exact_in`).
    """
    begin(EARLY)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile, split = tl.program_id(0) % TILES, tl.program_id(1)
    rows = tl.program_id(0) // TILES * BN + tl.arange(0, BN)
    first_column = split * STEPS * BK
    if offs_ptr is not None:
        expert, first, count, tile = _expert_of(offs_ptr, tile, M, E, BM)
        if expert > E:
            return
        matrix = tl.minimum(expert, E - 1).to(tl.int64)
    else:
        per = (M + BM - 1) // BM
        matrix, count = (tile // per).to(tl.int64), M
        first = matrix * M
        tile = tile % per
    tokens = tile * BM + tl.arange(0, BM)
    x_row = (first + tl.minimum(tokens, count - 1)).to(tl.int64) * C
    n = tl.minimum(rows, N - 1)
    q_row = (matrix * N + n) * R
    scale_row = n // F.scale_rows
    s_row = matrix * SE + scale_row * SC
    nest_row = matrix * NE + scale_row // F.nest_rows * NS
    g = groups_at(first_column, SC, F, BK)
    raw = tl.load(s_ptr + place(s_row, g, F, BK))
    zero_raw = raw
    if F.zero:
        zero_raw = tl.load(z_ptr + place(s_row, g, F, BK))
    if LEFT:
        sums = tl.zeros((BN, BM), tl.float32)
    else:
        sums = tl.zeros((BM, BN), tl.float32)
    for step in range(STEPS):
        k = first_column + step * BK
        column = k + tl.arange(0, BK)
        codes = codes_tile(q_ptr, q_row, k, R, F, BK, EVEN)
        if EVEN:
            x = tl.load(x_ptr + (x_row[:, None] + column[None, :]))
        else:
            x = tl.load(x_ptr + (x_row[:, None] + column[None, :]), mask=(column < C)[None, :], other=0.0)
        w = values_in(codes, dtype, F) if EXACT else values(codes, table_ptr, F)
        if F.group:
            scale = read_scale(raw, ss_ptr, sz_ptr, place(nest_row, g // F.nest_columns, F, BK), F).to(w.dtype)
            zero = zero_raw.to(w.dtype)
            g = groups_at(k + BK, SC, F, BK)  # those of the next tile are under way while this one is worked on
            raw = tl.load(s_ptr + place(s_row, g, F, BK))
            if F.zero:
                zero_raw = tl.load(z_ptr + place(s_row, g, F, BK))
            w = scaled(w, scale, zero, F)
        elif F.zero:
            w = w - zero_raw.to(w.dtype)[:, None]
        w = w.to(dtype)
        if LEFT:
            sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
        else:
            sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    if F.group == 0:
        scale = read_scale(raw, ss_ptr, sz_ptr, nest_row, F)
        sums = sums * (scale[:, None] if LEFT else scale[None, :])
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n).to(tl.float32)
        sums = sums + (bias[:, None] if LEFT else bias[None, :])
    if offs_ptr is not None:
        sums = tl.where(expert == E, 0.0, sums)
    y_row = (split * M + first + tokens).to(tl.int64) * N
    at = y_row[None, :] + rows[:, None] if LEFT else y_row[:, None] + rows[None, :]
    inside = (
        (tokens < count)[None, :] & (rows < N)[:, None] if LEFT else (tokens < count)[:, None] & (rows < N)[None, :]
    )
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["MN"])
def add_splits(
    part_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    MN: tl.tensor,
    N: tl.tensor,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """y = the sum of the splits, the first first, + bias."""
    begin(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < MN
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(SPLIT):
        total += tl.load(part_ptr + i * MN.to(tl.int64) + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


# -- on the host ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fixed:
    """What does not change from call to call. It is its own key: compared by identity, hashed at no cost."""

    plan: Plan
    dtype: torch.dtype
    table: Tensor | None
    blocks: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]


@functools.cache
def _fixed(scheme: str, shape: tuple[int, ...], dtype: torch.dtype, tiling: Tiling, device: torch.device) -> _Fixed:
    p, dtype, span = plan(scheme, shape), computed_in(dtype), tiling.split * tiling.bk
    return _Fixed(
        plan=p, dtype=dtype, table=table_of(scheme, dtype, device), blocks=-(-p.rows // tiling.bn),
        sizes=(p.rows, p.columns, p.row_units, p.scale_columns, p.nest_columns, p.scales, p.nests),
        constants={
            "F": p.numbers, "E": p.stack, "BN": tiling.bn, "BM": tiling.bm, "BK": tiling.bk, "STEPS": -(-p.columns // span),
            "LEFT": tiling.weight_left, "EVEN": p.columns % span == 0, "EXACT": exact_in(scheme, dtype),
        },
    )  # fmt: skip


def tiled(
    x: Tensor,
    parts: tuple[Tensor | None, ...],
    scheme: str,
    tiling: Tiling,
    bias: Tensor | None = None,
    offs: Tensor | None = None,
) -> Tensor:
    """The product by one tiling.

    Args:
        x: contiguous (M, K); for a stack of weights (T, K) with offs, or (E, M, K). parts: the weight's tensors (`parts_of`).
    """
    qdata, scale, zero_point, scale_scale, scale_zero_point = parts
    assert qdata is not None
    tokens, columns = x.shape[-2:]
    device, split = x.device, tiling.split
    fixed = _fixed(scheme, (*qdata.shape[:-1], columns), x.dtype, tiling, device)
    rows, experts = fixed.plan.rows, fixed.plan.stack
    tiles = -(-tokens // tiling.bm) * experts
    if offs is not None:  # an expert, or the tokens of none, has one tile that is not full at most
        tiles = tokens // tiling.bm + min(experts + 1, tokens)
    y = torch.empty((*x.shape[:-1], rows), dtype=fixed.dtype, device=device)
    part = y if split == 1 else torch.empty((split, tokens, rows), dtype=torch.float32, device=device)
    tensors = (
        qdata, x if x.dtype is fixed.dtype else x.to(fixed.dtype), scale, zero_point, scale_scale, scale_zero_point, fixed.table,
        bias if split == 1 else None, offs, part,
    )  # fmt: skip
    bias_dtype = None if bias is None else bias.dtype
    launch_packed(
        product, (tiles * fixed.blocks, split), tensors, (tokens, tiles, *fixed.sizes), fixed.constants,
        key=(fixed, bias_dtype), warps=tiling.warps, stages=tiling.stages,
    )  # fmt: skip
    if split > 1:
        launch_packed(
            add_splits, (-(-tokens * rows // 1024),), (part, bias, y), (tokens * rows, rows), {"SPLIT": split, "BLOCK": 1024},
            key=(fixed, bias_dtype), warps=4, stages=1,
        )  # fmt: skip
    return y if y.dtype is x.dtype else y.to(x.dtype)


@functools.lru_cache(maxsize=65536)
def _chosen(tokens: int, scheme: str, shape: tuple[int, ...], sm: int) -> Tiling | None:
    p = plan(scheme, shape)
    widest = 64 if p.numbers.kind == "codebook" else 128  # an address a look-up: registers
    return choose(tokens, p.rows, p.columns, sm, widest=widest, experts=p.stack)


_SCHEMA = "Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? scale_scale, Tensor? scale_zero_point"
_LIBRARY = torch.library.Library("lowp", "FRAGMENT")
_LIBRARY.define(f"w16(Tensor x, {_SCHEMA}, Tensor? bias, str scheme) -> Tensor")
_LIBRARY.define(f"w16_grouped(Tensor x, {_SCHEMA}, Tensor? offs, str scheme) -> Tensor")


def _w16(
    x_MK: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, scale_scale: Tensor | None,
    scale_zero_point: Tensor | None, bias: Tensor | None, scheme: str,
) -> Tensor:  # fmt: skip
    device, (tokens, columns) = x_MK.device, x_MK.shape
    rows = qdata.shape[0]
    if 0 in (tokens, rows, columns):
        zeros = x_MK.new_zeros((tokens, rows))
        return zeros if bias is None else zeros + bias.to(x_MK.dtype)
    parts = (qdata, scale, zero_point, scale_scale, scale_zero_point)
    tiling = _chosen(tokens, scheme, (rows, columns), device_capability(device.type, device.index))
    if tiling is None:
        w_NK = torch.ops.lowp.decode(*parts, None, scheme, columns, x_MK.dtype)
        return F.linear(x_MK, w_NK, None if bias is None else bias.to(x_MK.dtype))
    return tiled(x_MK.contiguous(), parts, scheme, tiling, bias)


def _w16_fake(
    x_MK: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, scale_scale: Tensor | None,
    scale_zero_point: Tensor | None, bias: Tensor | None, scheme: str,
) -> Tensor:  # fmt: skip
    return x_MK.new_empty((x_MK.shape[0], qdata.shape[0]))


def _grouped(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, scale_scale: Tensor | None,
    scale_zero_point: Tensor | None, offs: Tensor | None, scheme: str,
) -> Tensor:  # fmt: skip
    device, (experts, rows), columns = x.device, qdata.shape[:2], x.shape[-1]
    if 0 in x.shape or 0 in qdata.shape:
        return x.new_zeros((*x.shape[:-1], rows))
    parts = (qdata, scale, zero_point, scale_scale, scale_zero_point)
    sm = device_capability(device.type, device.index)
    tiling = _chosen(x.numel() // columns, scheme, (experts, rows, columns), sm)
    torch_can = x.dtype is torch.bfloat16 and sm >= 80 and rows % 8 == 0 and columns % 8 == 0  # rows of 16 bytes
    if tiling is None and (offs is None or torch_can):
        w_ENK = torch.ops.lowp.decode(*parts, None, scheme, columns, x.dtype)
        return x @ w_ENK.mT if offs is None else torch._grouped_mm(x.contiguous(), w_ENK.mT, offs=offs)
    tiling = tiling or Tiling(bn=128, bm=64, bk=64, weight_left=False, stages=3)
    return tiled(x.contiguous(), parts, scheme, tiling, offs=offs)


def _grouped_fake(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, scale_scale: Tensor | None,
    scale_zero_point: Tensor | None, offs: Tensor | None, scheme: str,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], qdata.shape[-2]))


register(_LIBRARY, "w16", _w16, _w16_fake)
register(_LIBRARY, "w16_grouped", _grouped, _grouped_fake)


def _input(x: Tensor, packed: Packed, spec: Spec) -> Tensor:
    return act_values(x, packed, spec, torch.float32).to(x.dtype) if spec.act or "act_pre_scale" in packed else x


def _run_linear(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    return torch.ops.lowp.w16(_input(x_MK, packed, spec), *parts_of(packed), bias, spec.scheme)


def _run_grouped(x: Tensor, packed: Packed, spec: Spec, offs: Tensor | None) -> Tensor:
    if offs is None and x.shape[0] != spec.shape[0]:
        x = x.expand(spec.shape[0], -1, -1)
    offs = None if offs is None else offs.contiguous()
    return torch.ops.lowp.w16_grouped(_input(x, packed, spec), *parts_of(packed), offs, spec.scheme)


def _run_matmul(x: Tensor, packed: Packed, spec: Spec, transposed: bool) -> Tensor:
    if transposed and x.dim() == 3 and len(spec.shape) == 3:
        return torch.ops.lowp.w16_grouped(x, *parts_of(packed), None, spec.scheme)
    weight = decode(packed, spec, x.dtype)
    return x @ (weight.mT if transposed else weight)


def _run_embedding(ids: Tensor, packed: Packed, spec: Spec, dtype: torch.dtype) -> Tensor:
    return decode(packed, spec, dtype, ids)


def _why_not(case: Case, axes: int) -> str:
    if refused := why_not_portable(case):
        return refused
    if axes and len(case.shape) != axes:
        return f"wants a weight of {axes} axes, got shape {case.shape}"
    return why_not_decoded(case.weight, case.shape)


def _why_not_linear(case: Case, weight_only: bool) -> str:
    if weight_only != (case.act is None):
        return f"wants {'a weight-only scheme' if weight_only else 'an activation format'}, got {case.scheme}"
    return _why_not(case, 2)


def _how(case: Case, many: str) -> str:
    many = many.format(most=_most_tokens(case.sm))
    return with_activation(case, f"{decoded(case, 'in registers')}, {float_units(case)}; {many}")


def _how_linear(case: Case) -> str:
    return _how(case, "above {most} tokens decoded once for each call, then torch's linear")


def _how_grouped(case: Case) -> str:
    if case.dtype == "bfloat16" and not any(size % 8 for size in case.shape[-2:]):  # what torch._grouped_mm takes
        return _how(case, "above {most} tokens an expert decoded once for each call, then torch's grouped product")
    return _how(case, "batches of more than {most} tokens an expert decoded once for each call, then torch's product")


def _how_matmul(case: Case) -> str:
    stacks = "; stacks read transposed: decoded in registers" if len(case.shape) == 3 else ""
    return f"{decoded(case)}, torch's {short(case)} product{stacks}"


def _how_embedding(case: Case) -> str:
    return f"rows gathered, {decoded(case, 'in registers')}, in one launch"


_SCHEMES = tuple(known.spelling for known in known_formats() if "/" in known.spelling)
_GROUPED = (
    "int4/1x128*bf16",
    "int4/1x128*bf16+bf16",
    "int8/row",
    "e4m3/row",
    "e2m1/1x32*e8m0",
    "e2m1/1x16*e4m3/tensor",
    "nf4/1x64*bf16",
)

KERNELS = (
    Kernel(
        op="linear", name="w16", rank=120, layout="plain", why_not=functools.partial(_why_not_linear, weight_only=True),
        run=_run_linear, how=_how_linear, cases=tuple(scheme for scheme in _SCHEMES if "@" not in scheme),
        about="Triton: decoded in registers, multiplied on tensor cores; above some hundred tokens decoded once",
    ),
    Kernel(
        op="linear", name="w16_act", rank=250, layout="plain", why_not=functools.partial(_why_not_linear, weight_only=False),
        run=_run_linear, how=_how_linear, cases=tuple(scheme for scheme in _SCHEMES if "@" in scheme),
        about="as w16, the activation quantized and dequantized first",
    ),
    Kernel(
        op="grouped", name="w16", rank=120, layout="plain", why_not=functools.partial(_why_not, axes=3), run=_run_grouped,
        how=_how_grouped, cases=_GROUPED, about="as w16; each tile finds its expert on the device",
    ),
    Kernel(
        op="matmul", name="decode", rank=120, layout="plain", why_not=functools.partial(_why_not, axes=0), run=_run_matmul,
        how=_how_matmul, cases=_SCHEMES, about="decoded by Triton, then torch's matmul; (E, M, K) x (E, N, K) as grouped",
    ),
    Kernel(
        op="embedding", name="decode", rank=120, layout="plain", why_not=functools.partial(_why_not, axes=2), run=_run_embedding,
        how=_how_embedding, cases=_SCHEMES, about="Triton: rows gathered and decoded in one launch",
    ),
)  # fmt: skip
