"""FSDP2: the packed bytes travel, not floats.

torch's fully_shard asks a parameter for two functions: what to gather from every rank, and how to make the whole parameter
from what was gathered. Each rank holds some rows (N / world, K); the tensors that are cut with the rows are gathered, those
that serve the whole matrix (the scale of a tensor) are the same on every rank and stay where they are.

    pre:   shard -> bytes of qdata, scale, ...        post: gathered bytes -> QTensor (N, K)

Source: torch.distributed.fsdp, "all-gather extensions" (fsdp_pre_all_gather and fsdp_post_all_gather).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MisfitError, TensorRuleError
from ..layouts.base import Packed, Spec
from ..layouts.plain import tensor_shapes

if TYPE_CHECKING:
    from .qtensor import QTensor


def to_gather(shard: QTensor, whole_shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The tensors of a shard to be gathered along axis 0, as bytes, and what `from_gathered` needs to know."""
    if shard.spec.layout != "plain" or shard.is_lazy_view or shard.transposed:
        raise TensorRuleError(
            f"FSDP wants the layout plain, which can be cut by rows, got {shard!r}: call .to_layout('plain') before fully_shard."
        )
    mine, whole = tensor_shapes(shard.format, tuple(shard.shape)), tensor_shapes(shard.format, whole_shape)
    cut = tuple(name for name in shard.packed if name in mine and mine[name][0] != whole[name][0])
    travelling = cut or ("qdata",)  # of one rank nothing is cut, and FSDP wants something to gather all the same
    kept = {name: tensor for name, tensor in shard.packed.items() if name not in travelling}
    dtypes = tuple(shard.packed[name].dtype for name in travelling)
    spec = shard.spec.with_shape(whole_shape)
    return tuple(_as_bytes(shard.packed[name]) for name in travelling), (travelling, dtypes, kept, spec)


def from_gathered(
    gathered: tuple[Tensor, ...], known: tuple[Any, ...], dtype: torch.dtype
) -> tuple[Packed, Spec, torch.dtype]:
    """The packed tensors of the whole parameter, as views of what was gathered."""
    travelling, dtypes, kept, spec = known
    wanted = tensor_shapes(spec.weight, spec.shape)
    packed = dict(kept)
    for name, kind, tensor in zip(travelling, dtypes, gathered, strict=True):
        shape = wanted[name][0]
        if tensor.numel() != torch.Size(shape).numel() * kind.itemsize:
            raise MisfitError(
                f"FSDP wants {name} of {spec.scheme} {spec.shape} in equal shards, got {tensor.numel()} bytes: "
                "choose a number of ranks that divides the rows."
            )
        packed[name] = tensor.view(-1).view(kind).view(shape)
    order = [name for name in wanted if name in packed] + [name for name in packed if name not in wanted]
    return {name: packed[name] for name in order}, spec, dtype


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
