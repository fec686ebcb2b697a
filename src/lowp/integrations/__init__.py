"""Floor 6: the hand-over to other people's libraries. One file a library, imported when it is used.

`load` stands here because it may have to build the model, which is another library's business.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from ..quantize.checkpoint import load_into


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """A model from a checkpoint of ours.

    Args:
        directory: as `lowp.save` or `lowp quantize` wrote it.
        model: a model of the same architecture, which may be on the meta device. Absent, transformers builds it from config.json.
        device: where the model goes. dtype: cast floats to it; absent, as they were. verify: compare files with their SHA-256.

    Returns:
        The model, in eval mode if it was built here.

    Raises:
        CheckpointError: missing, truncated, altered or foreign files; names or shapes that differ from the model's.

    >>> from tempfile import TemporaryDirectory
    >>> from lowp.quantize.checkpoint import save
    >>> with TemporaryDirectory() as folder:
    ...     _ = save(torch.nn.Sequential(torch.nn.Linear(2, 2)), f"{folder}/out")
    ...     load(f"{folder}/out", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    if model is not None:
        return load_into(model, directory, device=device, dtype=dtype, verify=verify)
    from .transformers import empty_model

    return load_into(empty_model(directory), directory, device=device, dtype=dtype, verify=verify).eval()


__all__ = ["load"]
