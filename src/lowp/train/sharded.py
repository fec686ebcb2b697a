"""FSDP2: the weight is cast before it is gathered, so that codes travel, half the bytes of bf16 and a quarter of float32.

    each rank    w_shard (N / P, K) floats  ->  codes by row, in the format of the forward product
    all-gather   codes, and the scales of rows or blocks              N K bytes + 4 N  instead of 2 N K
    all ranks    QTensor (N, K)  ->  forward; its transpose by turning the codes  ->  grad_input

A scale of the whole tensor needs its largest magnitude on all ranks: one all-reduce a weight, or one for all weights together by
`precompute_scales` after each step of the optimizer. Where one scale serves the tensor or a square, the numbers are those of one
process, bit for bit. By row the forward product is; the column form is cast from the gathered codes, which rounds numbers twice,
but with scales that are powers of two the smallest alone.

    convert(model, ...); gather_codes(model); fully_shard(...); optimizer = ...
    each step:  forward, backward, optimizer.step(), precompute_scales(model)

The parameter of a layer becomes a DTensor whose local tensor is a `ShardedWeight`: floats that know how they travel. Optimizers
compute with those floats; what they make (states, gradients) are plain tensors. A checkpoint holds plain floats. Of a layer that
a style of `parallel.py` split first, FSDP gathers this rank's part; a scale of the tensor is that of all parts.

Source: torch.distributed.fsdp, "all-gather extensions".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..errors import MisfitError
from ..numerics import Format, Parts, quantize
from ..ops.cast import cast_both, parts_of
from ..tensor import QTensor
from ..tensor.sharding import from_gathered, to_gather
from .linear import Linear
from .recipes import Recipe

_aten = torch.ops.aten
_KEEP = {  # what makes a shard, or the same shard elsewhere: the result still knows how it travels
    _aten.alias.default, _aten.as_strided.default, _aten.clone.default, _aten.copy_.default, _aten.detach.default,
    _aten.empty_like.default, _aten.new_zeros.default, _aten._pin_memory.default, _aten.slice.Tensor, _aten.split.Tensor,
    _aten._to_copy.default, _aten.view.default, _aten.chunk.default,
}  # fmt: skip


class ShardedWeight(torch.Tensor):
    """A weight's floats, or a rank's rows of them, that FSDP2 gathers as codes.

    Args:
        floats: (N, K) or a shard of it. recipe: of the layer. split: the mesh over which a style split the layer, or None.

    Attributes:
        scale: () or None, the scale of the tensor as `precompute_scales` found it, for the numbers of that moment.
    """

    floats: Tensor
    recipe: Recipe
    split: Any
    scale: Tensor | None
    _writes: list[int]  # how often the numbers were written to, shared by all views of them
    _seen: tuple[int, int] | None

    @staticmethod
    def __new__(
        cls: type[ShardedWeight], floats: Tensor, recipe: Recipe, scale: Tensor | None = None, split: Any = None
    ) -> ShardedWeight:
        self = torch.Tensor._make_wrapper_subclass(
            cls, floats.shape, strides=floats.stride(), storage_offset=floats.storage_offset(), dtype=floats.dtype,
            device=floats.device, requires_grad=floats.requires_grad,
        )  # fmt: skip
        self.floats, self.recipe, self.scale, self.split = floats, recipe, scale, split
        self._writes, self._seen = [0], None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = next((arg for arg in args if isinstance(arg, ShardedWeight)), None)
        plain_args, plain_kwargs = tree_map_only(ShardedWeight, lambda weight: weight.floats, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        _count_writes(func, args, kwargs)
        if func in _KEEP and first is not None:
            out = tree_map(lambda t: first._like(t, shares=func.is_view) if isinstance(t, Tensor) else t, out)
            return return_and_correct_aliasing(func, args, kwargs, out)
        if first is not None and out is first.floats:  # in place
            return first
        return out

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["floats"] + (["scale"] if self.scale is not None else []), (self.recipe, self.split)

    @classmethod
    def __tensor_unflatten__(cls, tensors: Any, about: Any, outer_size: Any, outer_stride: Any) -> ShardedWeight:
        recipe, split = about
        return cls(tensors["floats"], recipe, tensors.get("scale"), split)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedWeight({self.recipe.name}, {self.floats})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A checkpoint holds the floats alone: any model reads it, and loading copies into the weight that is there."""
        floats = self.floats.detach()
        plain = nn.Parameter(floats, requires_grad=self.requires_grad) if isinstance(self, nn.Parameter) else floats
        return plain.__reduce_ex__(protocol)

    def _like(self, floats: Tensor, shares: bool) -> ShardedWeight:
        made = ShardedWeight(floats, self.recipe, split=self.split)
        if shares:
            made._writes = self._writes
        return made

    def _now(self) -> tuple[int, int]:
        # Below a DTensor no version counts, but every write comes by `__torch_dispatch__`; a compiled one writes to the floats.
        return self._writes[0], self.floats._version

    def given_scale(self) -> Tensor | None:
        """The scale of the tensor, if it was found for the numbers that are there now."""
        return self.scale if self._seen == self._now() else None

    def keep_scale(self, scale: Tensor) -> None:
        """Remember the scale of the tensor for the numbers that are there now."""
        self.scale, self._seen = scale, self._now()

    def fsdp_pre_all_gather(self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
        """What FSDP2 gathers: the bytes of the codes by row, and their scales."""
        fmt = _row_format(self.recipe)
        floats, (rows, columns) = self.floats, tuple(outer_size)
        ranks = mesh.size()
        block = Format.parse(str(fmt)).block_dims((rows, columns))[0] if fmt.block != "tensor" else 1
        if rows % (ranks * block):
            raise MisfitError(
                f"FSDP wants {self.recipe.name} weights whose rows are multiples of {ranks} ranks x {block}, got {rows} x "
                f"{columns}: choose other ranks, or leave this layer out of gather_codes."
            )
        scale = None
        if fmt.block == "tensor":
            scale = self.given_scale()
            if scale is None:
                scale = _scales([self], _groups(mesh) + (_groups(self.split) if self.split is not None else []))[0]
        made = cast_both(floats, str(fmt), None, act_scale=scale)
        shard = QTensor.from_parts(parts_of(made, fmt), str(fmt), dtype=mp_policy.param_dtype or floats.dtype)
        return to_gather(shard, (rows, columns))

    def fsdp_post_all_gather(
        self, all_gather_outputs: Any, metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole weight as codes, in the memory that FSDP2 gathered into; with `out` that one, its scale made new."""
        packed, spec, dtype = from_gathered(tuple(all_gather_outputs), metadata, param_dtype)
        if out is None:
            kept = {name: tensor.clone() if name in metadata[2] else tensor for name, tensor in packed.items()}
            return QTensor.of(kept, spec, dtype=dtype), tuple(all_gather_outputs)
        whole = out._local_tensor if hasattr(out, "_local_tensor") else out
        for name, tensor in metadata[2].items():
            whole.packed[name].data.copy_(tensor)  # type: ignore[attr-defined]  # not counted as a change: backward reads it
        return None


def _count_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Remember which weights an operation wrote to; one at a time, or a list of them."""
    if func._schema.is_mutable:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for weight in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                    if isinstance(weight, ShardedWeight):
                        weight._writes[0] += 1


def gather_codes(model: nn.Module) -> dict[str, str]:
    """Let FSDP2 gather the codes of every converted layer's weight; call it before fully_shard and before the optimizer is made.

    Returns:
        The layers whose floats travel all the same, each with the reason.

    >>> gather_codes(nn.Sequential(Linear(32, 32)))
    {}
    """
    left, made = {}, {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or isinstance(local_of(layer.weight), ShardedWeight):
            continue
        weight = layer.weight
        if isinstance(weight, DTensor) and (layer.split is None or weight.device_mesh != layer.split.mesh):
            left[name] = "its weight is sharded already: call gather_codes before fully_shard"
            continue
        if layer.recipe.operands.w_row is None or layer.recipe.operands.w_column is None:
            left[name] = f"{layer.recipe.name} multiplies the weight itself backward"
            continue
        if any(
            p is weight for other in model.modules() if not isinstance(other, Linear) for p in other.parameters(False)
        ):
            left[name] = "its weight is tied to a layer that reads floats"
            continue
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(_travelling(weight, layer.recipe), requires_grad=weight.requires_grad)
        layer.weight = made[id(weight)]
    return left


def _travelling(weight: Tensor, recipe: Recipe) -> Tensor:
    """The same floats, or a rank's part of them, as a `ShardedWeight`."""
    if not isinstance(weight, DTensor):
        return ShardedWeight(weight.data, recipe)
    mesh = weight.device_mesh
    part = ShardedWeight(weight.to_local().detach(), recipe, split=mesh)
    return DTensor.from_local(
        part, mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    ).detach()


def precompute_scales(model: nn.Module) -> int:
    """Find the scales of all sharded weights that have one for the tensor, in one all-reduce; call it after optimizer.step().

    Returns:
        How many weights.
    """
    by_mesh: dict[Any, list[ShardedWeight]] = {}
    for layer in model.modules():
        weight = layer.weight if isinstance(layer, Linear) else None
        local = None if weight is None else local_of(weight)
        if isinstance(local, ShardedWeight) and _row_format(local.recipe).block == "tensor":
            by_mesh.setdefault(weight.device_mesh, []).append(local)  # type: ignore[union-attr]
    for mesh, weights in by_mesh.items():
        for weight, scale in zip(weights, _scales(weights, _groups(mesh)), strict=True):
            weight.keep_scale(scale)
    return sum(map(len, by_mesh.values()))


def local_of(weight: Tensor) -> Tensor:
    """A rank's tensor of a DTensor, and any other itself."""
    local: Tensor = getattr(weight, "_local_tensor", weight.data)
    return local


def _row_format(recipe: Recipe) -> Format:
    return Format.parse(str(recipe.operands.w_row))


def _groups(mesh: Any) -> list[Any]:
    return [mesh.get_group(axis) for axis in range(mesh.ndim)]


def _scales(weights: list[ShardedWeight], groups: list[Any]) -> list[Tensor]:
    """The scale of each tensor, from its shards on all ranks: by the largest magnitude, or by the mean one (ternary)."""
    formats = [_row_format(weight.recipe) for weight in weights]
    means = [fmt.rule == "absmean" for fmt in formats]
    floats = [weight.floats.detach().to(torch.float32) for weight in weights]
    tops = torch.stack([t.abs().sum() if mean else t.abs().amax() for t, mean in zip(floats, means, strict=True)])
    counts = torch.tensor([t.numel() for t in floats], dtype=torch.float32, device=tops.device)
    for group in groups:
        if any(means):
            sums, counts = torch.where(torch.tensor(means, device=tops.device), tops, 0), counts.clone()
            both = torch.cat((sums, counts))
            dist.all_reduce(both, dist.ReduceOp.SUM, group)
            sums, counts = both.chunk(2)
        if not all(means):
            dist.all_reduce(tops, dist.ReduceOp.MAX, group)
        if any(means):
            tops = torch.where(torch.tensor(means, device=tops.device), sums, tops)
    return [
        stored_scale(top / count if mean else top, fmt)
        for top, count, mean, fmt in zip(tops, counts, means, formats, strict=True)
    ]


def stored_scale(top: Tensor, fmt: Format) -> Tensor:
    """The scale as the format stores it, for a tensor of which this is the largest (or mean) magnitude."""
    parts: Parts = quantize(top.reshape(1, 1), fmt)
    assert parts.scale is not None
    return parts.scale.reshape(())
