"""A layer that computes with the numbers it will be served in, while its parameters stay floats.

    y = F.linear(fake(x), fake(W), b)          fake(W) = dequantize(quantize(W)), bit for bit what `convert` will keep

`FakeQuantize` is the function of one tensor, a module so that it can hold what is learned (`learn.py`) and be switched off.
A prepared layer is the module that it was, of a class made on the spot that stands before its own: `FakeQuantizedLinear` is an
nn.Linear. Inside its own forward `self.weight` reads as the fake-quantized weight; elsewhere it is the plain parameter, under its
own name: for optimizers, FSDP, state_dict, whoever ties or merges weights. So any layer that reads its weights in its forward
can be prepared: linear layers, embeddings and their subclasses, convolutions, stacks of experts.

nn.Linear's own forward is one function here, which keeps x and W for its backward and quantizes both again there: what a model
keeps between forward and backward is the same, prepared or not.

Source: Jacob et al., arXiv 1712.05877, section 3 (simulated quantization).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics import Format, Parts, dequantize, quantize
from ..numerics.reach import inside
from ..ops.fake_quantize import check_clamp, fake_quantize, fake_quantize_again, fused, stopped

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


@dataclass(frozen=True)
class Rule:
    """A format and what becomes of the gradient of numbers that were clamped."""

    fmt: Format
    clamp: str

    def values(self, x: Tensor) -> Tensor:
        """Fake-quantized, for a forward."""
        return fake_quantize(x, self.fmt)

    def again(self, x: Tensor) -> Tensor:
        """The same, for a backward."""
        return fake_quantize_again(x, self.fmt)

    def seen(self, x: Tensor, again: bool = False) -> Tensor:
        """The values of an activation: under a compiler its own business where it may be (`ops.fake_quantize.fused`)."""
        y = fused(x, self.fmt)
        return y if y is not None else self.again(x) if again else self.values(x)

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient at x."""
        return stopped(grad, x, self.fmt, self.clamp)


class _Linear(torch.autograd.Function):
    """A linear layer of fake-quantized operands that keeps the operands themselves: both are quantized again in the backward."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None, weight: Rule, act: Rule | None) -> Tensor:
        ctx.weight, ctx.act, ctx.low = weight, act, autocast_dtype(x_MK)
        ctx.save_for_backward(x_MK, w_NK)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        with torch.autocast(x_MK.device.type, enabled=False):
            seen = x_MK if act is None else act.seen(x_MK)
            return F.linear(*(None if t is None else cast(t, ctx.low) for t in (seen, weight.values(w_NK), bias_N)))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x_MK, w_NK), weight, act = ctx.saved_tensors, ctx.weight, ctx.act
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MN @ cast(weight.again(w_NK), ctx.low)).to(x_MK.dtype)
            grad_x = grad_x if act is None else act.gradient(grad_x, x_MK)
        if ctx.needs_input_grad[1]:
            seen = cast(x_MK if act is None else act.seen(x_MK, again=True), ctx.low)
            grad_w = weight.gradient((grad_MN.T @ seen).to(w_NK.dtype), w_NK)
        if ctx.needs_input_grad[2]:
            grad_b = grad_MN.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_w, grad_b, None, None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What a product of x computes in where autocast is on; None where it is off."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x in a dtype, or as it is."""
    return x if dtype is None else x.to(dtype)


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
    _fused: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        return _empty_prepared, (kind.__bases__[1], kind.fake_names, kind.__bases__[0]), self.__dict__

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own, with its weights, and its input where the scheme says so, fake-quantized."""
        if self._fused and all(fake.enabled for fake in (self.fake_weight, self.fake_act) if fake is not None):
            parameters = self._parameters  # type: ignore[attr-defined]
            rules = rule_of(self.fake_weight), rule_of(self.fake_act)
            y = _Linear.apply(x.reshape(-1, x.shape[-1]), parameters["weight"], parameters["bias"], *rules)
            return y.reshape(*x.shape[:-1], y.shape[-1])
        if self.fake_act is not None:
            x = as_tokens(self.fake_act, x)
        self._reading = True
        try:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._reading = False


def _empty_prepared(kind: type[nn.Module], names: tuple[str, ...], first: type) -> nn.Module:
    """What pickle and copy fill."""
    made = prepared_class(kind, names, first)
    return made.__new__(made)


def rule_of(fake: Any) -> Rule | None:
    """What a FakeQuantize does, as plain values."""
    return None if fake is None else Rule(fake.format, fake.clamp)


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
            parameter = self._parameters.get(name)
            if parameter is None:
                raise AttributeError(f"{type(self).__name__} has no parameter {name!r}")
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
    module._fused = (  # type: ignore[assignment]
        type(module).forward is FakeQuantized.forward
        and type(module).__bases__[1].forward is nn.Linear.forward
        and all(type(fake) is FakeQuantize and fake.choose is None for fake in (weight, act) if fake is not None)
    )
    module.scheme = scheme  # type: ignore[assignment]
    module.fake_weight, module.fake_act = weight, act


def restore_module(module: nn.Module) -> None:
    """Turn a prepared layer into what it was, in place."""
    for name in ("fake_weight", "fake_act", "scheme", "_reading", "_fused"):
        delattr(module, name)
    module.__class__ = type(module).__bases__[1]


def is_prepared(module: nn.Module) -> bool:
    """Whether a layer is fake-quantized."""
    return isinstance(module, FakeQuantized)
