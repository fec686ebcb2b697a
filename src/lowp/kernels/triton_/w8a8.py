"""8-bit times 8-bit on tensor cores: int8 with int32 sums, float8 with float32 sums, the activation cast on the way in.

    y_MN = (x_q @ w_q.T) * x_scale * w_scale + bias          scales by row or tensor, after the sum
    y_MN = sum over blocks of 128 columns of (x_q @ w_q.T) * x_scale_MG * w_scale + bias        128x128 with 1x128 (DeepSeek)
    y_MN = (x_q @ w_q.T - x_zero_M * sum_K(w_q)) * x_scale * w_scale + bias                     int8 with a zero point

Two launches: the cast, and the product, whose last program for each tile adds what the others summed. With few tokens the product
is a matter of reading the weight once: the weight is the left operand, so that a tile of 16 tokens fills the instruction; the
columns are shared out over several programs, whose sums go to a workspace; the program that comes last, by a counter, adds them
in order, so the result does not depend on the order of arrival. The counters are set to zero by the cast.

What depends on M is decided by rule, in w8a8_tiling.py, or by what `lowp tune` measured: the tile, the split, or torch's own
product.

Legend: M tokens, N output channels, K columns; BM x BN x BK is a tile; KB = K / BK.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...numerics import Parts, Scheme
from ...ops import tuned
from ...ops.how import native
from ...ops.registry import Case, Kernel
from ..torch_.int_mm import int_mm
from ..torch_.scaled_mm import scaled_mm_blocks, scaled_mm_rows
from . import interpreted
from .cast import Cast, cast_tensors, plan_of, why_not_format
from .launch import aligned, begin, define, launch, plain
from .w8a8_tiling import COUNTERS, Tiling, candidates, choose, tiling, torch_can

# -- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["M"],
    do_not_specialize_on_alignment=["xs_ptr", "ws_ptr", "zero_ptr", "sum_ptr", "bias_ptr", "part_ptr", "count_ptr"],
)
def _product_kernel(
    x_ptr, w_ptr, y_ptr, xs_ptr, ws_ptr, zero_ptr, sum_ptr, bias_ptr, part_ptr, count_ptr, M, N, xs_rows,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    GROUP: tl.constexpr, XS: tl.constexpr, WS: tl.constexpr, INTEGER: tl.constexpr, EXACT: tl.constexpr, ONES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One tile, or one part of its columns. XS, WS: 0 one scale, 1 by row, 2 by 1x128, 3 by 128x128. ONES: token M is ones."""
    begin(EARLY)
    BLOCKED: tl.constexpr = WS >= 2
    STEPS: tl.constexpr = (K + BK - 1) // BK // SPLIT
    WHOLE: tl.constexpr = K % BK == 0
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    part, tile = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tile // (GROUP * tiles_n)  # so many tiles of tokens share the weight in the L2
    height = min(tiles_m - band * GROUP, GROUP)
    tile_m = band * GROUP + (tile % (GROUP * tiles_n)) % height
    tile_n = (tile % (GROUP * tiles_n)) // height
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = part * STEPS * BK + tl.arange(0, BK)
    # Rows beyond the end repeat the last one; they are not stored. Small tiles do not read tokens beyond: many programs would ask
    # for the last again and again, which is one place in the L2 cache.
    n_in = tl.minimum(n, N - 1)
    m_in = tl.minimum(m, M if ONES else M - 1)
    real = m < (M + 1 if ONES else M)

    if SWAP:
        acc = tl.zeros((BN, BM), dtype=SUM)
        x_at = x_ptr + m_in[None, :].to(tl.int64) * K + k[:, None]
        w_at = w_ptr + n_in[:, None].to(tl.int64) * K + k[None, :]
    else:
        acc = tl.zeros((BM, BN), dtype=SUM)
        x_at = x_ptr + m_in[:, None].to(tl.int64) * K + k[None, :]
        w_at = w_ptr + n_in[None, :].to(tl.int64) * K + k[:, None]
    for step in range(STEPS):
        if WHOLE:
            if SWAP:
                x = tl.load(x_at, mask=real[None, :], other=0.0)
            else:  # large tiles: masks would cost more than the last tile's reads
                x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = (step * BK + k) < K
            if SWAP:
                x = tl.load(x_at, mask=inside[:, None], other=0.0)
                w = tl.load(w_at, mask=inside[None, :], other=0.0)
            else:
                x = tl.load(x_at, mask=inside[None, :], other=0.0)
                w = tl.load(w_at, mask=inside[:, None], other=0.0)
        x_at += BK
        w_at += BK
        if BLOCKED:
            group = (part * STEPS + step) * BK // 128
            xs = tl.load(xs_ptr + group * xs_rows + m_in)
            if WS == 3:
                ws = tl.load(ws_ptr + n_in // 128 * (K // 128) + group)
            else:
                ws = tl.load(ws_ptr + n_in * (K // 128) + group)
            if SWAP:
                acc += tl.dot(w, x) * (ws[:, None] * xs[None, :])
            else:
                acc += tl.dot(x, w) * (xs[:, None] * ws[None, :])
        elif INTEGER:
            if SWAP:
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        elif EXACT:  # sums leave the tensor core, which holds fewer bits than float32, after every step
            if SWAP:
                acc = tl.dot(w, x, acc, max_num_imprecise_acc=BK)
            else:
                acc = tl.dot(x, w, acc, max_num_imprecise_acc=BK)
        else:
            if SWAP:
                acc = tl.dot(w, x, acc)
            else:
                acc = tl.dot(x, w, acc)

    last = True
    if SPLIT > 1:
        if SWAP:
            place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        else:
            place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        parts = part_ptr + tile.to(tl.int64) * (SPLIT * BM * BN)
        tl.store(parts + part * (BM * BN) + place, acc, cache_modifier=".cg")
        tl.debug_barrier()
        last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.load(parts + place, cache_modifier=".cg")
            for other in tl.range(1, SPLIT, loop_unroll_factor=4):  # loads in flight together
                acc += tl.load(parts + other * (BM * BN) + place, cache_modifier=".cg")
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + tl.minimum(m, M - 1)).to(tl.int32)
            if ONES:  # a token of ones sums the weight's rows
                total = tl.sum(tl.where(m[None, :] == M, acc, 0), axis=1)
            else:
                total = tl.load(sum_ptr + n_in)
            if SWAP:
                acc -= total[:, None] * zero[None, :]
            else:
                acc -= zero[:, None] * total[None, :]
        y = acc.to(tl.float32)
        if not BLOCKED:
            xs = tl.load(xs_ptr + tl.minimum(m, M - 1) * XS).to(tl.float32)
            ws = tl.load(ws_ptr + n_in * WS).to(tl.float32)
            if SWAP:
                y = y * xs[None, :] * ws[:, None]
            else:
                y = y * xs[:, None] * ws[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + n_in).to(tl.float32)
            y += bias[:, None] if SWAP else bias[None, :]
        if SWAP:
            to = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
            inside = (m[None, :] < M) & (n[:, None] < N)
        else:
            to = y_ptr + m[:, None].to(tl.int64) * N + n[None, :]
            inside = (m[:, None] < M) & (n[None, :] < N)
        tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)


# -- what is chosen by M ----------------------------------------------------------------------------------------------


@tuned.kept
def _chosen(scheme: str, dtype: torch.dtype, tokens: int, more: int, rows: int, columns: int, sm: int) -> Tiling | None:
    """What was measured, or the rule's choice for `more` tokens beside; None: torch's product."""
    measured = tuned.choice("w8a8", tuned.key_of(scheme, dtype, (rows, columns), tokens))
    if measured == _TORCH:
        return None
    return tuned.record_of(Tiling, measured) or choose(tokens + more, rows, columns, sm, _weights(scheme).kind, dtype)


_TORCH = {"how": "torch"}


def _candidates(case: Case, tokens: int) -> list[dict[str, Any]]:
    """For `lowp tune`: every tiling, and torch's product."""
    (rows, columns), kind, dtype = case.shape, _weights(case.scheme).kind, getattr(torch, case.dtype)
    found = [asdict(one) for one in candidates(tokens, rows, columns, case.sm, kind)]
    return [*found, _TORCH] if torch_can(rows, columns, case.sm, kind, dtype) else found


# -- the product ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weights:
    """What is fixed for a scheme: kind of product, how scales are found, and the activation's zero point."""

    kind: str
    x_scales: int
    w_scales: int
    zero: bool


_SCALES = {"tensor": 0, "row": 1, "1x128": 2, "128x128": 3}


@functools.cache
def _weights(scheme: str) -> _Weights:
    parsed = Scheme.parse(scheme)
    assert parsed.act is not None
    w_scales, integer = _SCALES[parsed.weight.block], parsed.weight.element.kind == "int"
    return _Weights(
        kind="int8" if integer else "blocks" if w_scales >= 2 else "e4m3",
        x_scales=_SCALES[parsed.act.block],
        w_scales=w_scales,
        zero=parsed.act.zero_point is not None,
    )


def product(
    x: Cast, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, scheme: str, tokens: int, dtype: torch.dtype, tiled: Tiling,
    fill: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product of a cast activation and a weight by one tiling; `fill`: counters, zero, where columns are shared out.

    Where x has a zero point and holds one token more, that one is all ones."""
    about = _weights(scheme)
    (rows, columns), device = w_NK.shape, w_NK.device
    y_MN = torch.empty(tokens, rows, dtype=dtype, device=device)
    tiles = -(-tokens // tiled.bm) * -(-rows // tiled.bn)
    parts = None
    if tiled.split > 1:
        sums = torch.int32 if about.kind == "int8" else torch.float32
        parts = torch.empty(tiles * tiled.split * tiled.bm * tiled.bn, dtype=sums, device=device)
        fill = torch.zeros(COUNTERS, dtype=torch.int32, device=device) if fill is None else fill
    zero = x.zero_point
    ones = x.codes.shape[0] == tokens + 1 and zero is not None
    total = w_NK.sum(dim=-1, dtype=torch.int32) if zero is not None and not ones else None
    exact = tokens <= 64 or dtype is not torch.bfloat16
    key = (
        tiled, about, columns, exact, ones, dtype, aligned(w_NK), w_scale.dtype,
        None if bias is None else bias.dtype, None if zero is None else zero.dtype, device.index,
    )  # fmt: skip

    def constants() -> tuple[Any, ...]:
        return (
            columns, tiled.bm, tiled.bn, tiled.bk, tiled.split, tiled.swap, tiled.group, about.x_scales, about.w_scales,
            about.kind == "int8", exact, ones,
        )  # fmt: skip

    xs_rows = x.scale.stride(1) if about.x_scales == 2 else 16
    fill = None if parts is None else fill
    args = (x.codes, w_NK, y_MN, x.scale, w_scale, zero, total, bias, parts, fill, tokens, rows, xs_rows)
    launch(_product_kernel, key, (tiles * tiled.split, 1, 1), args, constants, device, tiled.warps, tiled.stages)
    return y_MN


@triton.jit(
    do_not_specialize=["M"], do_not_specialize_on_alignment=["xs_ptr", "ws_ptr", "zero_ptr", "sum_ptr", "bias_ptr"]
)
def _scale_kernel(
    s_ptr, y_ptr, xs_ptr, ws_ptr, zero_ptr, sum_ptr, bias_ptr, M, N, XS: tl.constexpr, WS: tl.constexpr, BN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A piece of a row of int32 sums, scaled."""
    begin(EARLY)
    m = tl.program_id(0) // tl.cdiv(N, BN)
    n = tl.program_id(0) % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
    inside = n < N
    at = m.to(tl.int64) * N + n
    sums = tl.load(s_ptr + at, mask=inside, other=0)
    if zero_ptr is not None:
        sums -= tl.load(zero_ptr + m).to(tl.int32) * tl.load(sum_ptr + n, mask=inside, other=0)
    w_scale = tl.load(ws_ptr + n * WS, mask=inside, other=0.0).to(tl.float32)
    y = sums.to(tl.float32) * tl.load(xs_ptr + m * XS).to(tl.float32) * w_scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def scaled(
    sums_MN: Tensor, x: Cast, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, scheme: str, dtype: torch.dtype
) -> Tensor:
    """int32 sums of torch's product, scaled in one pass."""
    (tokens, rows), device, zero, about = sums_MN.shape, sums_MN.device, x.zero_point, _weights(scheme)
    y_MN = torch.empty((tokens, rows), dtype=dtype, device=device)
    total = w_NK.sum(dim=-1, dtype=torch.int32) if zero is not None else None
    constants = (about.x_scales, about.w_scales, 1024)
    key = (
        "scale", constants, dtype, w_scale.dtype, None if bias is None else bias.dtype, None if zero is None else zero.dtype,
        device.index,
    )  # fmt: skip
    args = (sums_MN, y_MN, x.scale, w_scale, zero, total, bias, tokens, rows)
    launch(_scale_kernel, key, (tokens * -(-rows // 1024), 1, 1), args, lambda: constants, device, 4)
    return y_MN


def linear(
    x_MK: Tensor, w_NK: Tensor, w_scale: Tensor, act_scale: Tensor | None, pre_scale: Tensor | None, bias: Tensor | None,
    scheme: str, tiled: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """The whole linear: cast and product. tiled: instead of what `choose` says."""
    (tokens, columns), rows, dtype = x_MK.shape, w_NK.shape[0], x_MK.dtype
    if tokens == 0:
        return x_MK.new_empty((0, rows))
    about, act = _weights(scheme), Scheme.parse(scheme).act
    assert act is not None
    more = int(about.zero and tokens < 64)  # a token of ones
    if tiled is None:
        tiled = _chosen(scheme, dtype, tokens, more, rows, columns, _sm(x_MK))
    if tiled is None and interpreted():
        tiled = tiling(tokens, rows, columns, _sm(x_MK), about.kind)
    more = int(more and tiled is not None and tiled.swap and tokens < tiled.bm)
    w_NK, w_scale = w_NK.contiguous(), w_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    plan = plan_of(act, columns, x_MK.device)
    blocks = about.x_scales == 2
    padded = -(-tokens // 16) * 16 if blocks else tokens + more  # columns of scales start at multiples of 16 numbers
    fill = None
    if tiled is not None and tiled.split > 1:
        fill = torch.empty(COUNTERS, dtype=torch.int32, device=x_MK.device)
    x = cast_tensors(x_MK, plan, pre_scale, act_scale, rows=padded, across=blocks, fill=fill)
    if more:
        x.codes[tokens:].fill_(1)
    if tiled is not None:
        return product(x, w_NK, w_scale, bias, scheme, tokens, dtype, tiled, fill)
    if about.kind == "int8":
        return scaled(int_mm(x.codes, w_NK), x, w_NK, w_scale, bias, scheme, dtype)
    if about.kind == "blocks":
        y_MN = scaled_mm_blocks(x.codes, x.scale, w_NK, w_scale)[:tokens]
        return y_MN if bias is None else y_MN.add_(bias)
    return scaled_mm_rows(x.codes, x.scale, w_NK, w_scale, bias, dtype)


def _sm(x: Tensor) -> int:
    return _capability(x.device.index) if x.device.type == "cuda" else 90  # the interpreter plays a Hopper


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _fake(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    act_scale: Tensor | None,
    pre_scale: Tensor | None,
    bias: Tensor | None,
    scheme: str,
) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))


define(
    "w8a8",
    "(Tensor x, Tensor w, Tensor w_scale, Tensor? act_scale, Tensor? pre_scale, Tensor? bias, str scheme) -> Tensor",
    linear,
    _fake,
)

# -- the table --------------------------------------------------------------------------------------------------------

_PAIRS = (("row", "row"), ("tensor", "tensor"), ("row", "tensor"), ("tensor", "row"))


def _why_not(case: Case) -> str:
    weight, act = case.weight, case.act
    if (
        act is None
        or weight.zero_point
        or weight.scale not in ("fp32", "bf16", "fp16")
        or weight.element.name not in ("int8", "e4m3")
    ):
        return f"wants int8 or e4m3 weights without a zero point and activations to match, got {case.scheme}"
    if (
        act.element.name != weight.element.name
        or act.nested
        or act.scale != "fp32"
        or act.zero_point not in (None, "int8")
    ):
        return f"wants activations in {weight.element.name} with fp32 scales, got {act}"
    blocks = (
        (weight.block, act.block) == ("128x128", "1x128") and weight.element.name == "e4m3" and weight.scale == "fp32"
    )
    if not blocks and (weight.block, act.block) not in _PAIRS:
        return f"wants scales by row or tensor, or e4m3/128x128@e4m3/1x128, got {case.scheme}"
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    wanted = 80 if weight.element.name == "int8" else 89
    if case.sm < wanted:
        return f"wants sm{wanted} for products of {weight.element.name}, got sm{case.sm}"
    if len(case.shape) != 2 or any(size % 16 or not size for size in case.shape):
        return f"wants a matrix with N and K in multiples of 16, got {case.shape}"
    dtypes = ("bfloat16", "float16", "float32") if weight.element.name == "int8" else ("bfloat16", "float16")
    if case.dtype not in dtypes:  # the tensor cores sum float8 products in fewer bits than float32 has
        return f"wants {' or '.join(dtypes)} with {weight.element.name}, got {case.dtype}"
    return why_not_format(act, case.shape[-1], case.extras)


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    args: tuple[Any, ...] = (
        x_MK, packed["qdata"], packed["scale"], packed.get("act_scale"), packed.get("act_pre_scale"), bias, spec.scheme
    )  # fmt: skip
    y_MN: Tensor = linear(*args) if plain(x_MK) else torch.ops.lowp.w8a8(*args)
    return y_MN


def _why_not_product(case: Case) -> str:
    formats = [fmt for fmt in (case.weight, case.act) if fmt is not None]
    integers = all(fmt.element.name in ("int8", "ternary") and fmt.block in ("row", "tensor") for fmt in formats)
    if len(formats) < 2 or not integers or any(fmt.zero_point or fmt.scale != "fp32" for fmt in formats):
        return f"wants int8 or ternary by row or tensor on both sides, with fp32 scales, got {case.scheme}"
    if case.device != "cuda" or case.sm < 80:
        return f"wants cuda and sm80, got {case.device} and sm{case.sm}"
    if any(size % 16 or not size for size in case.shape):
        return f"wants N and K in multiples of 16, got {case.shape}"
    return (
        ""
        if case.dtype in ("bfloat16", "float16", "float32")
        else f"wants a float of at most 32 bits, got {case.dtype}"
    )


def _run_product(a: Parts, b: Parts, scheme: str, dtype: torch.dtype, fast: bool) -> Tensor:
    assert a.scale is not None and b.scale is not None
    (tokens, columns), rows = a.qdata.shape, b.qdata.shape[0]
    tiled = _chosen(scheme, dtype, tokens, 0, rows, columns, _sm(a.qdata))
    x, w_NK, w_scale = Cast(a.qdata.contiguous(), a.scale.contiguous()), b.qdata.contiguous(), b.scale.contiguous()
    if tiled is None and interpreted():
        tiled = tiling(tokens, rows, columns, _sm(a.qdata), "int8")
    if tiled is None:
        return scaled(int_mm(x.codes, w_NK), x, w_NK, w_scale, None, scheme, dtype)
    return product(x, w_NK, w_scale, None, scheme, tokens, dtype, tiled)


def _how(case: Case) -> str:
    integer = case.weight.element.kind == "int"
    return native(case, "int8 tensor cores with int32 sums" if integer else "float8 tensor cores")


KERNELS = (
    Kernel(
        op="linear", name="w8a8", rank=60, layout="plain", why_not=_why_not, run=_run, how=_how,
        cases=(
            "e4m3/row@e4m3/row", "e4m3/tensor@e4m3/tensor", "e4m3/128x128@e4m3/1x128", "int8/row@int8/row",
            "int8/row@int8/row+int8", "int8/tensor@int8/tensor", "int8/row*bf16@int8/row",
        ),
        about="fused cast, then int8 or float8 tensor cores, in Triton; torch's product where it is faster",
        candidates=_candidates,
    ),
    Kernel(
        op="product", name="w8a8", rank=60, layout="", why_not=_why_not_product, run=_run_product,
        how=lambda case: "native: int8 tensor cores with int32 sums, scaled on the way out",
        cases=("int8/row@int8/row", "int8/tensor@int8/tensor", "ternary/tensor@int8/row"),
        about="int8 tensor cores, scales on the way out, in Triton",
    ),
)  # fmt: skip
