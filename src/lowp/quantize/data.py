"""Calibration data: sequences of one length, spread evenly over a text.

Methods that read statistics want the text to look like what the model will read; which sequences of it are taken matters less
than that they are many. The same text, count and length give the same batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MisfitError


def sequences(ids: Tensor, count: int, length: int, *, batch: int = 8) -> list[Tensor]:
    """Batches (batch, length) of token ids.

    Args:
        ids: (n,) of a text. count: sequences in all; neighbours overlap where the text is short. length: of each.

    Raises:
        MisfitError: a text shorter than one sequence.

    >>> [tuple(one.shape) for one in sequences(torch.arange(100), 3, 10, batch=2)]
    [(2, 10), (1, 10)]
    """
    if len(ids) < length or count < 1 or length < 1:
        raise MisfitError(
            f"calibration wants at least one sequence of {length} tokens, got a text of {len(ids)}: "
            "name a longer text, or fewer tokens a sequence."
        )
    step = (len(ids) - length) / max(count - 1, 1)
    starts = [round(i * step) for i in range(count)]
    return list(torch.stack([ids[start : start + length] for start in starts]).split(batch))
