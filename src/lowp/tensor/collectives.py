"""QTensors between processes: what the collectives that DTensor calls mean for them.

scatter, broadcast, allgather     to place a parameter: each packed tensor travels as bytes
all_gather_into_tensor            to put one together, DTensor.full_tensor(): what is cut with the rows is gathered, the rest
                                  is the same on every rank. Shards that are not equal are padded with rows of zeros before
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .qtensor import QTensor
from .rules import rule
from .sharding import from_gathered, to_gather


def _communicate() -> None:
    """Rules for the collectives that DTensor uses to place a parameter: each packed tensor travels as bytes."""
    if not torch.distributed.is_available():
        return
    c10d = torch.ops.c10d

    def each(tensors: Any, name: str) -> Any:
        if isinstance(tensors, (list, tuple)):
            return [each(tensor, name) for tensor in tensors]
        # A cut across K shows contiguous strides, its packed tensors do not: a pack that is written to is always contiguous.
        inner = tensors.packed[name].contiguous()
        return inner.view(torch.uint8) if inner.dim() else inner

    @rule(c10d.scatter_.default, c10d.broadcast_.default, c10d.allgather_.default)
    def collective(func: Any, args: Any, kwargs: Any) -> Any:
        first = args[0][0]
        names = (first[0] if isinstance(first, (list, tuple)) else first).packed
        tensors = 1 if func is c10d.broadcast_.default else 2
        # Always asynchronous: a synchronous NCCL collective returns a null Work, and waiting for it is a crash. Who asked
        # for a synchronous one waits for the Work that is returned (torch.distributed.distributed_c10d).
        is_async = [str(argument.type) for argument in func._schema.arguments].index("bool")
        rest = [*args[tensors:is_async], True, *args[is_async + 1 :]]
        works = [func(*(each(arg, name) for arg in args[:tensors]), *rest, **kwargs)[-1] for name in names]
        for work in works[:-1]:
            work.wait()
        return (args[0], works[-1])

    functional = torch.ops._c10d_functional

    @rule(functional.all_gather_into_tensor.default)
    def gathered(func: Any, args: Any, kwargs: Any) -> QTensor:
        """DTensor.full_tensor() of a shard: what is cut with the rows is gathered, the rest is the same on all ranks."""
        x, world, *group = args
        tensors, known = to_gather(x, (x.shape[0] * world, *x.shape[1:]))
        out = [func(tensor, world, *group) for tensor in tensors]
        packed, spec, dtype = from_gathered(tuple(functional.wait_tensor(tensor) for tensor in out), known, x.dtype)
        return x.remade(packed, spec, dtype=dtype)

    importlib.import_module("torch.distributed._functional_collectives")  # brings the second of these, since torch 2.13
    waits = [functional.wait_tensor.default]
    if hasattr(functional, "_wrap_tensor_autograd"):
        waits.append(functional._wrap_tensor_autograd.default)

    @rule(*waits)
    def waited(func: Any, args: Any, kwargs: Any) -> QTensor:
        return args[0].map(torch.Tensor.detach)


_communicate()
