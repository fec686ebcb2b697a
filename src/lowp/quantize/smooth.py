"""Smoothing: multiply a layer's input by a factor for each column, and divide the weight's columns by it.

    (x * f) (W / f)^T = x W^T

so nothing changes in floats, but what is hard to round moves from the activations into the weights or back (SmoothQuant), or
important columns get a larger share of their block's range (AWQ). The product x * f costs nothing where the operation before
the layer can take it over: a norm's weight, or the rows of the linear layer that x comes from. Which one can is found by trial,
not by name: give it random powers of two, take them off the weights, and see whether the block answers the same bits. A product
with a power of two rounds nothing, so the answer is exact. Where no operation takes the factor it stays with the weight, as
`act_pre_scale`.

Sources: Xiao et al., SmoothQuant, arXiv 2211.10438, section 4; Lin et al., AWQ, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .match import Target

Answer = Callable[[], tuple[Tensor, list[Tensor]]]


def find_taker(group: Sequence[Target], before: Sequence[nn.Module], run: Answer) -> nn.Module | None:
    """The operation that can take a factor over for a group of layers that share an input.

    Args:
        group: linear layers. before: modules that ran before them, the latest first.
        run: on some data that reaches the group, what its input is, and all that the block answers.

    Returns:
        A norm or linear layer out of `before`, or None. Given the factor, it multiplies the group's input by it, to the bit, and
        the block answers something else; with the factor taken off the group's weights, the same bits as before.
    """
    weight = group[0].weight
    bits = torch.randint(0, 2, (weight.shape[-1],), generator=torch.Generator().manual_seed(0))
    factor_K = (2.0 ** (2 * bits - 1)).to(weight.device)
    found: tuple[Tensor, list[Tensor]] | None = None
    for module in before:
        if not can_take(module, weight.shape[-1]) or any(module is target.module for target in group):
            continue
        x, expected = found = run() if found is None else found
        with _changed([module, *(target.module for target in group)]):
            give(module, factor_K)
            given, other = run()
            if not torch.equal(given, x * factor_K.to(x.dtype)) or _same(other, expected):
                continue
            for target in group:
                target.weight.data.div_(factor_K.to(target.weight.dtype))
            if _same(run()[1], expected):
                return module
    return None


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def can_take(module: nn.Module, columns: int) -> bool:
    """Whether a module multiplies each of so many outputs by a weight, or makes each from a row of one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or type(weight) is not nn.Parameter or not weight.is_floating_point():
        return False
    norm = weight.shape == (columns,) and "norm" in type(module).__name__.lower()
    return norm or (isinstance(module, nn.Linear) and weight.shape[0] == columns)


def give(module: nn.Module, factor_K: Tensor) -> Tensor:
    """Multiply a module's outputs by a factor, by way of its weight and bias.

    Returns:
        What the factor has become: a norm's weight is rounded to its dtype, and the factor with it.
    """
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    before = weight.data.to(torch.float32, copy=True)
    weight.data.copy_(before * (factor_K if weight.dim() == 1 else factor_K.unsqueeze(1)))
    if weight.dim() == 1:  # the weight's rounding belongs to the factor
        factor_K = torch.where(before == 0, factor_K, weight.data / torch.where(before == 0, 1.0, before))
    if isinstance(bias, Tensor):
        bias.data.copy_(bias.data.to(torch.float32) * factor_K)
    return factor_K


@contextmanager
def _changed(modules: Sequence[nn.Module]) -> Any:
    """Weights and biases that may be changed, and are as before afterwards."""
    tensors = [t for module in modules for t in (module.weight, getattr(module, "bias", None)) if isinstance(t, Tensor)]
    before = [tensor.data.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data.copy_(data)
