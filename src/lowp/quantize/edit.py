"""Edits: change the weights of a float model in place, by a method that leaves its answers as they are (rotations).

A tensor is changed in float32 and rounded to its dtype once. All of a method's edits belong together: none, or all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .method import Edit, Edits


@torch.no_grad()
def edit_(model: nn.Module, edits: Edits) -> None:
    """Carry edits out on a model in place, in their order; what they untie becomes a tensor of its own first."""
    for fqn in edits.unties:
        own = model.get_parameter(fqn)
        _set(model, fqn, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))
    for name, edit in edits.by_name.items():
        trainable = model.get_parameter(name).requires_grad
        _set(model, name, nn.Parameter(edited(edit, name, model.get_parameter), requires_grad=trainable))
    config: Any = getattr(model, "config", None)
    if edits.unties and config is not None:
        config.tie_word_embeddings = False


def edited(edit: Edit, name: str, read: Any) -> Tensor:
    """A tensor after its edit, in its dtype. read: name -> tensor."""
    own: Tensor = read(name).detach()
    reads = [read(other).detach().to(own.device, torch.float32) for other in edit.reads]
    return edit.change(own.to(torch.float32), *reads).to(own.dtype).contiguous()


def _set(model: nn.Module, fqn: str, parameter: nn.Parameter) -> None:
    module_name, _, name = fqn.rpartition(".")
    model.get_submodule(module_name)._parameters[name] = parameter
