"""A layer that computes with the numbers it will be served in, while its parameters stay floats.

    y = F.linear(fake(x), fake(W), b)          fake(W) = dequantize(quantize(W)), bit for bit what `convert` will keep

`FakeQuantize` is the function of one tensor, a module so that it can hold what is learned (`learn.py`) and be switched off.
A prepared layer is the module that it was, of a class made on the spot that stands before its own: `FakeQuantizedLinear` is an
nn.Linear. Inside its own forward `self.weight` reads as the fake-quantized weight; elsewhere it is the plain parameter, under its
own name: for optimizers, FSDP, state_dict, whoever ties or merges weights. So any layer that reads its weights in its forward
can be prepared: linear layers, embeddings and their subclasses, convolutions, stacks of experts.

Source: Jacob et al., arXiv 1712.05877, section 3 (simulated quantization).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import Format, Parts, dequantize, quantize
from ..numerics.reach import inside
from ..ops.fake_quantize import check_clamp, fake_quantize

Choose = Callable[[Tensor, Format], Parts]


class _Chosen(torch.autograd.Function):
    """Quantize by somebody else's choice of numbers, and dequantize; the gradient's rule is that of `ops/fake_quantize.py`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format, choose: Choose, clamp: str) -> Tensor:
        ctx.fmt, ctx.choose, ctx.clamp = fmt, choose, clamp
        ctx.save_for_backward(x)
        return dequantize(choose(x.detach(), fmt), fmt, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if ctx.clamp == "zero":
            grad = torch.where(inside(x, ctx.choose(x.detach(), ctx.fmt), ctx.fmt), grad, 0)
        return grad, None, None, None


class FakeQuantize(nn.Module):
    """Quantize and dequantize a tensor, its scales taken from itself, with a straight-through gradient.

    Args:
        fmt: a Format or its spelling. clamp: "zero" stops the gradient of numbers that were clamped, "pass" lets it through;
            see `lowp.ops.fake_quantize`.
        choose: (tensor, format) -> parts, such as a Method's `run`; absent, the format's own rule.

    >>> FakeQuantize("int4/row")(torch.tensor([[1.4, -7.0]]))
    tensor([[ 1., -7.]])
    """

    def __init__(self, fmt: Format | str, *, clamp: str = "zero", choose: Choose | None = None) -> None:
        super().__init__()
        check_clamp(clamp)
        self.choose = choose
        self.format = Format.parse(fmt) if isinstance(fmt, str) else fmt
        self.clamp = clamp
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., N, K) -> the same shape and dtype; x itself where switched off."""
        if not self.enabled:
            return x
        if self.choose is not None:
            y: Tensor = _Chosen.apply(x, self.format, self.choose, self.clamp)
            return y
        return fake_quantize(x, self.format, clamp=self.clamp)

    def parts(self, x: Tensor) -> Parts:
        """What `forward` shows, as it is stored."""
        return quantize(x, self.format) if self.choose is None else self.choose(x, self.format)

    def extra_repr(self) -> str:
        """The format, and what differs from the usual."""
        return f"{self.format}" + ("" if self.enabled else ", off")


class FakeQuantized:
    """What a prepared layer is besides its own class; `prepared_class` puts the two together.

    Attributes:
        fake_weight: FakeQuantize of its weights. fake_act: of what comes in, or None.
        scheme: the spelling that it is prepared for; fake_names: the parameters that read as fake-quantized.
    """

    fake_names: tuple[str, ...] = ()
    scheme: str
    fake_weight: nn.Module
    fake_act: nn.Module | None
    _reading: bool

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own, with its weights, and its input where the scheme says so, fake-quantized."""
        if self.fake_act is not None:
            x = as_tokens(self.fake_act, x)
        self._reading = True
        try:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._reading = False


def as_tokens(fake: nn.Module, x: Tensor) -> Tensor:
    """An activation (..., K) through a FakeQuantize as a matrix of tokens, which is how products see it."""
    return fake(x) if x.dim() == 2 else fake(x.reshape(-1, x.shape[-1])).reshape(x.shape)


@functools.cache
def prepared_class(kind: type[nn.Module], names: tuple[str, ...], first: type = FakeQuantized) -> type[nn.Module]:
    """The class of a prepared layer: `FakeQuantized` (or a kind of it), then the layer's own; made once.

    >>> prepared_class(nn.Linear, ("weight",)).__mro__[2]
    <class 'torch.nn.modules.linear.Linear'>
    """

    def reader(name: str) -> property:
        def read(self: Any) -> Any:
            parameter = self._parameters[name]
            return _values(self, parameter) if self._reading else parameter

        return property(read)

    made = {name: reader(name) for name in names} | {"fake_names": names, "__module__": kind.__module__}
    return type(f"{first.__name__}{kind.__name__}", (first, kind), made)


def _values(module: Any, weight: Tensor) -> Tensor:
    """The fake-quantized weight, seen as the matrix that is quantized: a convolution's (O, C, ...) as (O, C...), GPT-2's (K, N)
    turned."""
    fake = module.fake_weight
    if isinstance(module, nn.modules.conv._ConvNd):
        return fake(weight.flatten(1)).reshape(weight.shape)
    return fake(weight.t()).t() if is_turned(module) else fake(weight)


def is_turned(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight stands (in, out)."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def prepare_module(
    module: nn.Module,
    names: tuple[str, ...],
    scheme: str,
    weight: nn.Module,
    act: nn.Module | None,
    first: type = FakeQuantized,
) -> None:
    """Turn a layer into a prepared one, in place."""
    module.__class__ = prepared_class(type(module), names, first)
    module._reading = False  # type: ignore[assignment]
    module.scheme = scheme  # type: ignore[assignment]
    module.fake_weight, module.fake_act = weight, act


def restore_module(module: nn.Module) -> None:
    """Turn a prepared layer into what it was, in place."""
    for name in ("fake_weight", "fake_act", "scheme", "_reading"):
        delattr(module, name)
    module.__class__ = type(module).__bases__[1]


def is_prepared(module: nn.Module) -> bool:
    """Whether a layer is fake-quantized."""
    return isinstance(module, FakeQuantized)
