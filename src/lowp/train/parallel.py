"""Tensor and sequence parallel: what is gathered is cast first.

    ColwiseParallel     w (N / P, K)   x  whole, or a rank's tokens    y (M, N / P)
    RowwiseParallel     w (N, K / P)   x (M, K / P)                    y  whole, or a rank's tokens

With sequence parallel the tokens of x (colwise, forward) and of the gradient (rowwise, backward) are gathered from all ranks:
here as codes with their scales, one byte an element. The form for the product over tokens is turned from the gathered codes,
which rounds a number twice unless one scale serves the tensor or scales are powers of two. Partial sums travel in floats, as
ever. A scale of the whole tensor is agreed on by an all-reduce of one number.

    parallelize_module(model, mesh, {"up": ColwiseParallel(sequence=True), "down": RowwiseParallel(sequence=True)})

The parameter becomes a DTensor, as with torch's styles of the same names. Tokens are split along the axis before the last, and
a rank gets and gives plain local tensors; a DTensor is laid out as the layer wants it.

Source: Korthikanti et al., "Reducing activation recomputation in large transformer models", arXiv 2205.05198, section 4.2.2.

Legend: M tokens of all ranks, N output channels, K input channels, P ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..errors import MisfitError
from ..numerics import Format
from ..ops.cast import cast_both, cast_turned, part_names
from ..tensor import QTensor
from .linear import Linear, codes_of, filled, multiply
from .recipes import Operands, Recipe
from .sharded import ShardedWeight, stored_scale

# torch 2.13 has new names for the collectives of one tensor.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Split(NamedTuple):
    """How a layer is split: over which ranks, by output channels or input channels, and whether tokens are split beside."""

    mesh: Any
    ranks: int
    colwise: bool
    sequence: bool

    @property
    def group(self) -> Any:
        """The mesh's, which a copy of the layer shares."""
        return self.mesh.get_group()

    def takes(self, x: Tensor) -> Any:
        """How x lies on the ranks, as DTensor has it."""
        return Shard(x.dim() - 1) if not self.colwise else Shard(x.dim() - 2) if self.sequence else Replicate()

    def gives(self, y: Tensor) -> Any:
        """How y does."""
        return Shard(y.dim() - 1) if self.colwise else Shard(y.dim() - 2) if self.sequence else Replicate()


class _Style(ParallelStyle):
    colwise = True

    def __init__(self, *, sequence: bool = False) -> None:
        super().__init__()
        self.sequence = sequence

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if not isinstance(module, Linear):
            raise MisfitError(
                f"{type(self).__name__} wants a layer that lowp.train.convert made, got {type(module).__name__}: convert first, "
                "or use torch's style of this name."
            )
        if isinstance(module.weight, (DTensor, ShardedWeight)):
            raise MisfitError(
                f"{type(self).__name__} wants a weight that is whole, got a {type(module.weight).__name__}: split layers first, "
                "once, then call gather_codes, then fully_shard."
            )
        ranks, (rows, columns) = device_mesh.size(), module.weight.shape
        if (rows if self.colwise else columns) % ranks:
            raise MisfitError(
                f"{type(self).__name__} wants a weight that {ranks} ranks divide, got {rows} x {columns}."
            )
        weight = distribute_tensor(module.weight, device_mesh, [Shard(0 if self.colwise else 1)])
        module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        if module.bias is not None:
            placement = Shard(0) if self.colwise else Replicate()
            bias = distribute_tensor(module.bias, device_mesh, [placement])
            module.bias = nn.Parameter(bias, requires_grad=module.bias.requires_grad)
        module.split = _Split(device_mesh, ranks, self.colwise, self.sequence)
        return module


class ColwiseParallel(_Style):
    """Split a converted layer by output channels.

    Args:
        sequence: x holds a rank's tokens (..., M / P, K), which are gathered as codes; else it is whole on every rank.
    """


class RowwiseParallel(_Style):
    """Split a converted layer by input channels.

    Args:
        sequence: y holds a rank's tokens (..., M / P, N), and the gradient is gathered as codes; else it is whole on every rank.
    """

    colwise = False


def split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, split: _Split) -> Tensor:
    """The layer on one rank: local tensors in and out, the parameters DTensors."""
    x = x.redistribute(placements=[split.takes(x)]).to_local() if isinstance(x, DTensor) else x
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    codes = codes_of(weight) if isinstance(weight, QTensor) else ()
    y = _SplitLinear.apply(x, weight, recipe, recipe.operands, split, torch.is_grad_enabled(), *codes)
    if bias is None:
        return y
    local = bias.to_local() if isinstance(bias, DTensor) else bias
    if not split.colwise and split.sequence:
        local = _SumGrad.apply(local, split)  # every rank adds it to its own tokens
    return y + local.to(y.dtype)


class _SumGrad(torch.autograd.Function):
    """Itself; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, split: _Split) -> Tensor:  # type: ignore[override]
        ctx.split = split
        return t.view_as(t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        total = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.split.group)
        return total, None


class _SplitLinear(torch.autograd.Function):
    """x (..., K), w -> y (..., N) of one rank, and both gradients. codes: of w by row, where FSDP gathered those."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w: Tensor, recipe: Recipe, of: Operands, split: _Split, training: bool, *codes: Tensor
    ) -> Tensor:
        ctx.recipe, ctx.of, ctx.split, ctx.w_dtype = recipe, of, split, w.dtype
        gather = split.colwise and split.sequence
        x_MK, lead = _by_rank(x, split.ranks if split.sequence and not split.colwise else 1)
        row, kept = _operand(x_MK, of.x_row, of.x_column, of, split, gather, training and ctx.needs_input_grad[1])
        w_row = list(codes) or _parts(w, of.w_row, None, _scale(w, of.w_row, split))
        y = multiply(row, w_row, recipe, "output", x.dtype)
        if not split.colwise:
            y = _summed(y, split)
        ctx.lead, ctx.kept = lead, len(kept)
        ctx.save_for_backward(*kept, *(codes or [w]))
        whole = split.ranks if gather else 1
        return _from_rank(y, lead, whole, split.ranks if split.sequence and not split.colwise else 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        recipe, of, split = ctx.recipe, ctx.of, ctx.split
        saved = list(ctx.saved_tensors)
        kept, w = saved[: ctx.kept], saved[ctx.kept :]
        gather = not split.colwise and split.sequence
        g_MN, lead = _by_rank(g, split.ranks if split.sequence and split.colwise else 1)
        need_x, need_w = ctx.needs_input_grad[:2]
        row, g_kept = _operand(g_MN, of.g_row, of.g_column, of, split, gather, need_w, recipe.stochastic)
        dx = dw = None
        if need_x:
            dx = multiply(row, _turned(w, of, split, g.dtype), recipe, "grad_input", g.dtype)
            dx = _summed(dx, split) if split.colwise else dx
            whole = split.ranks if gather else 1
            dx = _from_rank(dx, lead, whole, split.ranks if split.sequence and split.colwise else 1)
        if need_w:
            g_T = _column(g_kept, of.g_row, of.g_column, of, gather and not recipe.stochastic, g.dtype)
            x_T = _column(kept, of.x_row, of.x_column, of, split.colwise and split.sequence, g.dtype)
            dw = multiply(g_T, x_T, recipe, "grad_weight", g.dtype).to(ctx.w_dtype)
        return (dx, dw, *(None for _ in ctx.needs_input_grad[2:]))


def _turned(w: list[Tensor], of: Operands, split: _Split, dtype: torch.dtype) -> list[Tensor]:
    """The column form of a rank's weight: from its floats, or from the codes by row."""
    if len(w) > 1:
        return cast_turned(w, of.w_row or "", of.w_column or "", dtype)
    return _parts(w[0], None, of.w_column, _scale(w[0], of.w_column, split)) if of.w_column else [w[0].t()]


# -- tokens by rank -----------------------------------------------------------------------------------------------------------


def _by_rank(x: Tensor, ranks: int) -> tuple[Tensor, tuple[int, ...]]:
    """(..., T, K) as (M, K); with ranks > 1 the tokens of rank 0 first, then those of rank 1, as collectives have them."""
    lead = tuple(x.shape[:-1])
    if ranks > 1 and len(lead) > 1:
        x = x.unflatten(-2, (ranks, lead[-1] // ranks)).movedim(-3, 0)
    return x.reshape(-1, x.shape[-1]), lead


def _from_rank(y: Tensor, lead: tuple[int, ...], gathered: int, scattered: int) -> Tensor:
    """The inverse, for tokens (gathered) times as many as came, or (scattered) times fewer."""
    if gathered > 1:
        y = y.view(gathered, *lead, -1).movedim(0, -3).flatten(-3, -2)
        return y.contiguous()
    return y.reshape(*lead[:-1], lead[-1] // scattered, -1)


def _gathered(t: Tensor, split: _Split) -> Tensor:
    """(M / P, ...) of each rank -> (M, ...), one byte an element where it is a code."""
    mine = t.contiguous().view(torch.uint8)
    wide = mine.new_empty((split.ranks * mine.shape[0], *mine.shape[1:]))
    _all_gather(wide, mine, split.group)
    return wide.view(t.dtype)


def _summed(partial: Tensor, split: _Split) -> Tensor:
    """Partial sums of all ranks added: a rank's tokens of them, or all."""
    partial = partial.contiguous()
    if not split.sequence:
        dist.all_reduce(partial, group=split.group)
        return partial
    mine = partial.new_empty((partial.shape[0] // split.ranks, *partial.shape[1:]))
    _reduce_scatter(mine, partial, group=split.group)
    return mine


# -- operands -----------------------------------------------------------------------------------------------------------------


def _scale(t: Tensor, fmt: str | None, split: _Split) -> Tensor | None:
    """The scale of a tensor that is spread over the ranks, where the format has one for all."""
    parsed = Format.parse(fmt) if fmt else None
    if parsed is None or parsed.block != "tensor":
        return None
    mean = parsed.rule == "absmean"
    top = t.detach().abs().to(torch.float32)
    top = (top.mean() if mean else top.amax()).reshape(1)
    dist.all_reduce(top, dist.ReduceOp.SUM if mean else dist.ReduceOp.MAX, split.group)
    return stored_scale(top / split.ranks if mean else top, parsed)


def _parts(
    t: Tensor, row: str | None, column: str | None, scale: Tensor | None, multiple: int = 1, stochastic: bool = False
) -> list[Tensor]:
    return cast_both(t.detach(), row, column, act_scale=scale, multiple=multiple, stochastic=stochastic)


def _operand(
    t: Tensor, row: str | None, column: str | None, of: Operands, split: _Split, gather: bool, keep: bool,
    stochastic: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """An operand by row, of all ranks' tokens where they are gathered; and what its column form is made of later."""
    scale = None if stochastic else _scale(t, row, split)
    if gather and row and column and not stochastic:
        if (t.shape[0] * split.ranks) % of.multiple:
            raise MisfitError(
                f"sequence parallel wants tokens in multiples of {of.multiple}, got {t.shape[0]} on each of {split.ranks} ranks."
            )
        parts = _parts(t, row, None, scale)
        tensors = [part if part.numel() == 1 and scale is not None else _gathered(part, split) for part in parts]
        return tensors, tensors if keep else []
    if gather:
        t = _gathered(t, split)
    below = None if stochastic or not keep else scale if row == column else _scale(t, column, split)
    if keep and row and column and (row == column or (scale is None and below is None)):
        made, count = _parts(t, row, column, scale, of.multiple, stochastic), len(part_names(Format.parse(row)))
        return made[:count], made[count:]
    by_row = _parts(t, row, None, scale, 1, stochastic) if row else [t]
    by_column = _parts(t, None, column, below, of.multiple, stochastic) if keep and column else [t]
    return by_row, by_column if keep else []


def _column(
    kept: list[Tensor], row: str | None, column: str | None, of: Operands, gather: bool, dtype: torch.dtype
) -> list[Tensor]:
    """The column form of an operand."""
    if column is None:
        return [filled(kept[0], of).t()]
    if gather and row:
        return cast_turned(kept, row, column, dtype)
    return kept
