"""The distillation loss against torch's own pieces, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from lowp.errors import MisfitError
from lowp.qat import distill


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_value_and_gradient(weight, temperature, monkeypatch):
    monkeypatch.setattr("lowp.qat.loss._NUMBERS_AT_ONCE", 100)  # several pieces
    student, teacher = torch.randn(3, 7, 40, dtype=torch.float32), torch.randn(3, 7, 40)
    targets = torch.randint(0, 40, (3, 7))
    targets[0, 2:5] = -100
    counted = targets != -100
    answers = []
    for ours in (True, False):
        x = student.clone().requires_grad_()
        if ours:
            loss = distill(x, teacher, targets, weight=weight, temperature=temperature)
        else:
            q, p = (
                (x[counted].double() / temperature).log_softmax(-1),
                (teacher[counted].double() / temperature).softmax(-1),
            )
            kl = F.kl_div(q, p, reduction="batchmean") * temperature**2
            loss = weight * kl + (1 - weight) * F.cross_entropy(x[counted].double(), targets[counted])
        (loss * 2).backward()
        answers.append((loss.double(), x.grad))
    for mine, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_words_that_the_teacher_rules_out_and_low_precision_logits():
    teacher = torch.randn(4, 10)
    teacher[:, 3] = -torch.inf
    student = torch.randn(4, 10, dtype=torch.bfloat16, requires_grad=True)
    loss = distill(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.dtype == torch.bfloat16


def test_half_precision_keeps_gradients_under_a_loss_scale():
    student = torch.randn(512, 400).half()
    teacher = (student + 0.1 * torch.randn(512, 400)).half()
    grads = []
    for dtype in (torch.float16, torch.float32):
        x = student.detach().to(dtype).clone().requires_grad_()
        (distill(x, teacher.to(dtype)) * 65536.0).backward()
        grads.append(x.grad.double())
    assert grads[0].isfinite().all() and (grads[0] - grads[1]).norm() < 2e-3 * grads[1].norm()


def test_errors_are_sentences():
    with pytest.raises(MisfitError, match="vocabulary"):
        distill(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(MisfitError, match="targets"):
        distill(torch.randn(2, 3), torch.randn(2, 3), weight=0.5)
    with pytest.raises(MisfitError, match=r"0\.\.1"):
        distill(torch.randn(2, 3), torch.randn(2, 3), weight=2)
