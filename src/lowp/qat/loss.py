"""Distillation: the float model that was quantized is the best teacher there is of the quantized one.

    L = weight * T^2 * KL(p || q) + (1 - weight) * CE          p = softmax(teacher / T),  q = softmax(student / T)

The mean over all positions whose target is not -100. KL gives each of the V words of each token its target, so that few tokens
go far, and it pulls toward what the float model says and no further: what is learned is quantization, not another text.

Memory: float32 copies exist for a few positions at a time, and the gradient of the student's logits is made in the forward, where
they are at hand; nothing else is kept. Sources: Hinton et al., arXiv 1503.02531; Liu et al., LLM-QAT, arXiv 2305.17888.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MisfitError

_NUMBERS_AT_ONCE = 1 << 23  # 32 MiB of float32
IGNORED = -100  # torch's own mark of a position that has no target


class _Distilled(torch.autograd.Function):
    """The loss, its gradient computed with it."""

    @staticmethod
    def forward(
        ctx: Any, student_PV: Tensor, teacher_PV: Tensor, targets_P: Tensor, weight: float, temperature: float
    ) -> Tensor:
        count = (targets_P != IGNORED).sum().clamp(min=1)
        wants = ctx.needs_input_grad[0]
        grad_PV = torch.empty_like(student_PV) if wants else None
        total = torch.zeros((), dtype=torch.float32, device=student_PV.device)
        step = max(1, _NUMBERS_AT_ONCE // max(student_PV.shape[1], 1))
        for start in range(0, len(student_PV), step):
            part = slice(start, start + step)
            loss, grad = _part(student_PV[part], teacher_PV[part], targets_P[part], weight, temperature)
            total += loss
            if grad_PV is not None:
                grad_PV[part] = grad
        if grad_PV is not None:
            ctx.save_for_backward(grad_PV, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        grad_PV, count = ctx.saved_tensors  # of order one: half precision holds them before they are scaled and divided
        factor, answer = grad.to(torch.float32) / count, torch.empty_like(grad_PV)
        step = max(1, _NUMBERS_AT_ONCE // max(grad_PV.shape[1], 1))
        for start in range(0, len(grad_PV), step):
            answer[start : start + step] = grad_PV[start : start + step].to(torch.float32) * factor
        return answer, None, None, None, None


def _part(
    student: Tensor, teacher: Tensor, targets: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """The summed loss of some positions and its gradient, float32."""
    counts = (targets != IGNORED).to(torch.float32)[:, None]
    x = student.to(torch.float32)
    plain = x.log_softmax(-1) if weight < 1 or temperature == 1 else x  # by T = 1 both terms share it
    loss, grad = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    if weight > 0:
        logp = _over(teacher.to(torch.float32), temperature).log_softmax(-1)
        logq = plain if temperature == 1 else _over(x, temperature).log_softmax(-1)
        p = logp.exp()
        kl = torch.where(p > 0, p * (logp - logq), 0.0)  # a word that the teacher rules out adds nothing
        loss = loss + weight * temperature**2 * (kl * counts).sum()
        grad = (logq.exp() - p).mul_(weight * temperature)
    if weight < 1:
        column = targets.clamp(min=0)[:, None]
        loss = loss - (1 - weight) * (plain.gather(1, column) * counts).sum()
        pull = plain.exp().scatter_add_(1, column, torch.full_like(column, -1, dtype=torch.float32))
        grad = pull.mul_(1 - weight).add_(grad)
    return loss, grad.mul_(counts)


def _over(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1 else x / temperature


def distill(
    student: Tensor, teacher: Tensor, targets: Tensor | None = None, *, weight: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The distillation loss.

    Args:
        student, teacher: (..., V) logits, any float dtype; no gradient goes to the teacher.
        targets: (...) integers, -100 where a position does not count; wanted where weight < 1.
        weight: of the KL divergence, 0 to 1; the rest is cross entropy. temperature: of both softmaxes in the KL.

    Returns:
        () float32, in nats a position.

    Raises:
        MisfitError: logits of two shapes, a weight out of range, or no targets for the cross entropy.

    >>> logits = torch.randn(2, 3, 10)
    >>> round(float(distill(logits, logits)), 6)
    0.0
    """
    if student.shape != teacher.shape:
        raise MisfitError(
            f"distill wants logits of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}: "
            "the two models want one vocabulary and one batch."
        )
    if not 0 <= weight <= 1 or temperature <= 0:
        raise MisfitError(f"distill wants a weight in 0..1 and a temperature above 0, got {weight} and {temperature}.")
    if targets is None:
        if weight < 1:
            raise MisfitError(f"distill with weight {weight} < 1 wants targets for its cross entropy, got none.")
        targets = torch.zeros(student.shape[:-1], dtype=torch.int64, device=student.device)
    flat = student.reshape(-1, student.shape[-1])
    loss: Tensor = _Distilled.apply(
        flat, teacher.detach().reshape(flat.shape), targets.reshape(-1), weight, temperature
    )
    return loss
