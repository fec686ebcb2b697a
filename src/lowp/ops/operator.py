"""Operators of torch's own kind: what torch.compile sees of a computation that it should not look into.

Called on tensors of numbers, a function here runs at once. While a graph is traced, or under a dispatch mode, it goes through
torch's dispatcher as `torch.ops.lowp.<name>`: one opaque node, which runs the same function later. So the numbers of a compiled
model are those of an eager one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lowp", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def plain(x: Tensor) -> bool:
    """A tensor of numbers that a kernel may be started on at once; else (a graph is traced) it goes through torch's operators."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, random: bool = False) -> None:
    """An operator `lowp::name`, opaque to torch.compile: `run` on tensors, `fake` for their shapes.

    random: it may draw from torch's generator, so that two calls are never taken for one."""
    _LIBRARY.define(f"{name}{schema}", tags=(*_TAGS, torch.Tag.nondeterministic_seeded) if random else _TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowp::{name}", fake, lib=_LIBRARY)
