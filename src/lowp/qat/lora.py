"""LoRA and QAT at once: the weight that is served is learned, through adapters of low rank, over a base that is frozen.

    y = F.linear(fake(x), fake(W + s B A), bias)          W (N, K) frozen, maybe quantized; A (r, K), B (N, r); s = alpha / r

What is fake-quantized is the merged weight, so that after `convert` one quantized weight is left: no adapter to serve, no
error of merging. The gradient straight through fake() is that of the merged weight, dW = dy^T x, and where no number can be
clamped it never has to exist:

    dB = s dW A^T = s dy^T (x A^T)          dA = s B^T dW = s (dy B)^T x          dx = dy fake(W + s B A)

two thin products instead of a wide one. Where numbers can be clamped, dW is made and masked. Nothing is saved but x and the
parameters: the merged weight is made again in the backward.

Source: Hu et al., LoRA, arXiv 2106.09685; Dettmers et al., QLoRA, arXiv 2305.14314 (the frozen base in 4 bits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MisfitError
from ..numerics import Format, Parts, quantize
from ..numerics.reach import clamps
from ..ops.fake_quantize import fake_quantize_merged, merged
from ..tensor import QTensor
from .fake import FakeQuantize, FakeQuantized, Rule, as_tokens, autocast_dtype, cast, rule_of


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters for `prepare(..., lora=Lora(rank=16))`: of linear layers; tied ones, embeddings, biases and norms learn as ever.

    Args:
        rank: r. alpha: the adapters count alpha / r. base: a scheme to keep the frozen weights in meanwhile, None for floats.
    """

    rank: int = 16
    alpha: float = 32.0
    base: str | None = None


class AdaptedQuantize(FakeQuantize):
    """Fake quantization of a frozen weight plus its adapters. B starts at zero: so does what is learned.

    Args:
        fmt, clamp: as of FakeQuantize. weight: (N, K), for shape, device and dtype.
    """

    def __init__(self, fmt: Format | str, weight: Tensor, lora: Lora, *, clamp: str = "zero") -> None:
        super().__init__(fmt, clamp=clamp)
        if lora.rank < 1:
            raise MisfitError(f"adapters want a rank of at least 1, got {lora.rank}.")
        rows, columns = weight.shape
        factory = dict(device=weight.device, dtype=weight.dtype)
        self.lora_a = nn.Parameter(torch.empty(lora.rank, columns, **factory))  # type: ignore[arg-type]
        self.lora_b = nn.Parameter(torch.zeros(rows, lora.rank, **factory))  # type: ignore[arg-type]
        if weight.device.type != "meta":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scaling = lora.alpha / lora.rank

    def merged(self, weight: Tensor) -> Tensor:
        """(N, K): the base plus the adapters, in the adapters' dtype."""
        return _merged(weight, self.lora_a, self.lora_b, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized merged weight; the merged one where switched off."""
        return super().forward(self.merged(x))

    def parts(self, x: Tensor) -> Parts:
        """What `forward` shows, as it is stored."""
        return quantize(self.merged(x), self.format)

    def extra_repr(self) -> str:
        """The format and the rank."""
        return f"{super().extra_repr()}, rank={self.lora_a.shape[0]}"


def _floats(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.dequantize() if isinstance(weight, QTensor) else weight).to(dtype)


def _merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    with torch.autocast(b.device.type, enabled=False):  # as `convert` merges
        return merged(_floats(weight, b.dtype), b, a, scaling)


class _LowRank(torch.autograd.Function):
    """The product with a fake-quantized merged weight, where no number of it can be clamped."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, a: Tensor, b: Tensor, weight: Tensor, fmt: Format, act: Rule | None, scaling: float
    ) -> Tensor:
        ctx.fmt, ctx.act, ctx.scaling, ctx.low = fmt, act, scaling, autocast_dtype(x_MK)
        ctx.save_for_backward(x_MK, a, b, weight)
        with torch.autocast(x_MK.device.type, enabled=False):
            seen = x_MK if act is None else act.seen(x_MK)
            values = fake_quantize_merged(_floats(weight, b.dtype), b, a, scaling, fmt)
            return F.linear(cast(seen, ctx.low), cast(values, ctx.low))

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_MK, a, b, weight = ctx.saved_tensors
        act, scaling, low = ctx.act, ctx.scaling, ctx.low
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            values = fake_quantize_merged(_floats(weight, b.dtype), b, a, scaling, ctx.fmt, again=True)
            grad_x = (grad_MN @ cast(values, low)).to(x_MK.dtype)
            grad_x = grad_x if act is None else act.gradient(grad_x, x_MK)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            seen = cast(x_MK if act is None else act.seen(x_MK, again=True), low)
            grad_a = ((grad_MN @ cast(b, low)).T @ seen).mul_(scaling).to(a.dtype)
            grad_b = (grad_MN.T @ (seen @ cast(a, low).T)).mul_(scaling).to(b.dtype)
        return grad_x, grad_a, grad_b, None, None, None, None


class Adapted(FakeQuantized):
    """A prepared linear layer whose weight is frozen and learned through adapters."""

    fake_weight: AdaptedQuantize

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        fake, act = self.fake_weight, self.fake_act
        weight, bias = self._parameters["weight"], self.bias  # type: ignore[attr-defined]
        if type(self).__bases__[1].forward is not nn.Linear.forward:
            return super().forward(x)
        plain = act is None or (type(act) is FakeQuantize and act.enabled)
        if fake.enabled and plain and (fake.clamp == "pass" or not clamps(fake.format)):
            y = _LowRank.apply(
                x.reshape(-1, x.shape[-1]), fake.lora_a, fake.lora_b, weight, fake.format, rule_of(act), fake.scaling
            )
            y = y.reshape(*x.shape[:-1], y.shape[-1])
            return y if bias is None else y + bias.to(y.dtype)
        return F.linear(x if act is None else as_tokens(act, x), fake(weight), bias)
