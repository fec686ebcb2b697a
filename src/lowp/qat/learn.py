"""Learned scales: the step between two codes is a parameter like any other (LSQ), and so is where an activation is cut off.

    y = (clamp(round(x / s + z)) - z) * s          s, z parameters

with the gradients of `ops/fake_quantize.py`. A scale gathers the gradient of all n numbers of its block, so it would move far
faster than a weight: LSQ divides it by sqrt(n * qmax), and so does `LearnedQuantize`.

    weight    one scale (and zero point) a block, started from the range of least squared error
    act       one static scale for the tensor ("range learning"), started from the first batch that comes by:
              the largest magnitude / qmax; afterwards nothing is measured any more, at training or serving

The parameters are float32 whatever the model is in. They are rounded as they are stored, straight through, so that what is
learned is what is served. Source: Esser et al., Learned Step Size Quantization, arXiv 1902.08153, sections 2.1 and 2.2; Bhalgat
et al., LSQ+, arXiv 2004.09576.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError
from ..numerics import Format, Parts, quantize
from ..numerics.format import rules_for
from ..numerics.math import quantize_given, read_scale
from ..ops.fake_quantize import fake_quantize_given
from .fake import FakeQuantize

_TINY = torch.finfo(torch.float32).tiny  # a scale is never stored below it


class _Slowed(torch.autograd.Function):
    """The identity, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def check_scale(scale: Tensor, name: str = "") -> None:
    """A MisfitError unless all learned scales are positive and finite."""
    lost = int((~(scale.detach() > 0) | ~scale.detach().isfinite()).sum())
    if lost:
        raise MisfitError(
            f"{name}{name and ': '}learned scales want to be positive and finite, got {lost} of {scale.numel()} that are not: "
            "training went astray, give the scales a smaller learning rate."
        )


class LearnedQuantize(FakeQuantize):
    """Fake quantization of a weight with a learned scale (and zero point) for each block.

    Args:
        fmt, clamp: as of FakeQuantize. weight: (..., N, K), where the scales start from.

    Raises:
        MisfitError: a format without a scale of its own: bf16 and its like.

    >>> fake = LearnedQuantize("int4/1x32", torch.randn(4, 64))
    >>> fake.scale.shape
    torch.Size([4, 2])
    """

    scale: nn.Parameter
    zero_point: nn.Parameter | None

    def __init__(self, fmt: Format | str, weight: Tensor, *, clamp: str = "zero") -> None:
        super().__init__(fmt, clamp=clamp)
        if self.format.is_identity:
            raise MisfitError(f"{self.format} has no scale to learn: take it out of the layers with learn='weight'.")
        best = self.format.with_rule("mse") if "mse" in rules_for(self.format) else self.format
        parts = quantize(weight, best)
        self.scale = nn.Parameter(read_scale(parts, best).clone())
        zero_point = None if parts.zero_point is None else nn.Parameter(parts.zero_point.to(torch.float32))
        self.register_parameter("zero_point", zero_point)
        numbers = weight.numel() / max(self.scale.numel(), 1)
        self.factor = 1 / math.sqrt(max(numbers * self.format.element.largest, 1e-12))

    def forward(self, x: Tensor) -> Tensor:
        """As FakeQuantize, with the learned scales."""
        if not self.enabled:
            return x
        scale = _Slowed.apply(self.scale, self.factor)
        zero_point = None if self.zero_point is None else _Slowed.apply(self.zero_point, self.factor)
        return fake_quantize_given(x, self.format, scale, zero_point, clamp=self.clamp)

    def check(self, name: str = "") -> None:
        """A MisfitError unless what was learned can be stored: scales positive and finite, zero points finite."""
        check_scale(self.scale, name)
        lost = 0 if self.zero_point is None else int((~self.zero_point.detach().isfinite()).sum())
        if lost:
            raise MisfitError(
                f"{name}{name and ': '}learned zero points want to be finite, got {lost} that are not: training went astray, "
                "give them a smaller learning rate."
            )

    def parts(self, x: Tensor) -> Parts:
        """What `forward` shows, as it is stored; scales that training made zero, negative or infinite are a MisfitError."""
        self.check()
        return quantize_given(x, self.format, self.scale, self.zero_point)

    def extra_repr(self) -> str:
        """The format, and that its scales are learned."""
        return f"{super().extra_repr()}, learned"


class LearnedRange(FakeQuantize):
    """Fake quantization of an activation with one learned scale: static when served (`act_scale`).

    Args:
        fmt: without a zero point and without a scale of the scale. columns: K, for the pace of the scale.

    Raises:
        MisfitError: a format whose activations cannot be static.
    """

    def __init__(self, fmt: Format | str, columns: int, *, clamp: str = "zero") -> None:
        super().__init__(fmt, clamp=clamp)
        if self.format.is_identity or self.format.zero_point or self.format.nested or self.format.scale == "e8m0":
            raise MisfitError(
                f"a learned range wants an activation with a plain scale and no zero point, got {self.format}: "
                "write @int8/tensor, or leave learn='act' out."
            )
        self.scale = nn.Parameter(
            torch.zeros(1)
        )  # zero: no batch has come by; not a scalar, which FSDP2 does not shard
        self.factor = 1 / math.sqrt(columns * self.format.element.largest)
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        """As FakeQuantize, with the learned scale; the first batch that holds a finite number but zero sets where it starts."""
        if not self.enabled:
            return x
        if not self.started and not self._start(x):
            return x
        return fake_quantize_given(x, self.format, _Slowed.apply(self.scale, self.factor), clamp=self.clamp)

    @torch.no_grad()
    def _start(self, x: Tensor) -> bool:
        """Set the scale where none is; answers whether there is one. A graph that is traced first looks each time."""
        largest = x.detach().abs().amax() if x.numel() else x.new_zeros(())
        largest = torch.where(largest.isfinite(), largest, 0).to(torch.float32) / self.format.element.largest
        tracing = torch.compiler.is_compiling()
        if not tracing and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)  # every rank starts from the same
        floor = _TINY if tracing else 0.0
        self.scale.copy_(torch.where(self.scale == 0, largest.clamp(min=floor), self.scale))
        if not tracing:
            self.started = bool(self.scale != 0)
        return tracing or self.started

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.started = False  # whether it has is read off the scale

    def act_scale(self) -> Tensor:
        """() float32, as it is served.

        Raises:
            MisfitError: no batch has come by yet, or training left no positive finite scale.
        """
        scale = self.scale.detach()
        if float(scale) == 0:
            raise MisfitError(
                "a learned range wants at least one batch before it is converted, got none: run the model once."
            )
        check_scale(scale)
        return scale.reshape(()).clone()

    def extra_repr(self) -> str:
        """The format, and that its range is learned."""
        return f"{super().extra_repr()}, learned"
