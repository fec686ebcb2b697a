"""Edits: change the weights of a float model in place, by a method that leaves its answers as they are (rotations).

A tensor is changed in float32 and rounded to its dtype once. All of a method's edits belong together: none, or all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError
from ..numerics.compare import relative_error
from .blocks import Batch, first_tensor, run_model
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


@torch.no_grad()
def edit_proved_(model: nn.Module, edits: Edits, batch: Batch) -> None:
    """The same, proved on a batch: where the model then answers something else, it is put back as it was.

    Raises:
        MisfitError: the answers differ by more than the rounding of the changed weights can make.
    """
    names = (*edits.by_name, *edits.unties)
    before = {name: model.get_parameter(name) for name in names}
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    expected = first_tensor(run_model(model, batch)).clone()
    edit_(model, edits)
    error = relative_error(expected, first_tensor(run_model(model, batch)))
    limit = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    if error <= limit:
        return
    for name, parameter in before.items():
        _set(model, name, parameter)  # type: ignore[arg-type]
    if tied is not None:
        config.tie_word_embeddings = tied
    raise MisfitError(
        f"{type(model).__name__} wants weights that it answers the same with, got answers that differ by {error:.2g} after the "
        "method's changes: it is built otherwise than its names say. Use a method without rotations."
    )


def edited(edit: Edit, name: str, read: Any) -> Tensor:
    """A tensor after its edit, in its dtype. read: name -> tensor."""
    own: Tensor = read(name).detach()
    reads = [read(other).detach().to(own.device, torch.float32) for other in edit.reads]
    return edit.change(own.to(torch.float32), *reads).to(own.dtype).contiguous()


def _set(model: nn.Module, fqn: str, parameter: nn.Parameter) -> None:
    module_name, _, name = fqn.rpartition(".")
    model.get_submodule(module_name)._parameters[name] = parameter
