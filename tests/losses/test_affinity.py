"""Losses against slow loops and finite differences, in float64 where gradients are compared."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress import losses


def unit(rows: int, width: int = 6) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=-1)


def softmax_row(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def slow_cross_entropy(target: list[float], logits: list[float]) -> float:
    log_total = math.log(sum(math.exp(v) for v in logits))
    return -sum(t * (v - log_total) for t, v in zip(target, logits, strict=True))


def test_info_nce_equals_a_slow_loop() -> None:
    u, v, scale, num = unit(4), unit(4), 7.0, 4
    total = 0.0
    for i in range(num):
        own = [float(i == j) for j in range(num)]
        total += slow_cross_entropy(own, [scale * float(u[i] @ v[j]) for j in range(num)])
        total += slow_cross_entropy(own, [scale * float(u[j] @ v[i]) for j in range(num)])
    torch.testing.assert_close(
        float(losses.clip_info_nce(u, v, scale)), total / (2 * num), rtol=1e-6, atol=1e-6
    )


def test_affinity_mimicking_equals_a_slow_loop() -> None:
    u, v, teacher_u, teacher_v, num = unit(4), unit(4), unit(4, 3), unit(4, 3), 4
    total = 0.0
    for i in range(num):
        teacher = softmax_row([9.0 * float(teacher_u[i] @ teacher_v[j]) for j in range(num)])
        total += slow_cross_entropy(teacher, [5.0 * float(u[i] @ v[j]) for j in range(num)])
        teacher = softmax_row([9.0 * float(teacher_v[i] @ teacher_u[j]) for j in range(num)])
        total += slow_cross_entropy(teacher, [5.0 * float(v[i] @ u[j]) for j in range(num)])
    value = losses.affinity_mimicking(u, v, teacher_u, teacher_v, 5.0, 9.0)
    torch.testing.assert_close(float(value), total / (2 * num), rtol=1e-6, atol=1e-6)


def test_affinity_is_least_where_student_and_teacher_agree() -> None:
    teacher_u, teacher_v = unit(5), unit(5)
    at_teacher = losses.affinity_mimicking(teacher_u, teacher_v, teacher_u, teacher_v, 8.0, 8.0)
    elsewhere = losses.affinity_mimicking(unit(5), unit(5), teacher_u, teacher_v, 8.0, 8.0)
    assert at_teacher < elsewhere
    u = teacher_u.clone().requires_grad_()
    losses.affinity_mimicking(u, teacher_v, teacher_u, teacher_v, 8.0, 8.0).backward()
    assert u.grad is not None and u.grad.abs().max() < 1e-12


def test_bank_affinity_equals_a_slow_loop() -> None:
    x, bank, teacher_x, teacher_bank = unit(3), unit(7), unit(3, 4), unit(7, 4)
    total = 0.0
    for i in range(3):
        teacher = softmax_row([6.0 * float(teacher_x[i] @ t) for t in teacher_bank])
        total += slow_cross_entropy(teacher, [4.0 * float(x[i] @ b) for b in bank])
    value = losses.bank_affinity(x, bank, teacher_x, teacher_bank, 4.0, 6.0)
    torch.testing.assert_close(float(value), total / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "affinity", "bank", "feature"])
def test_gradients_equal_finite_differences(name: str) -> None:
    v, teacher_u, teacher_v, bank = unit(4), unit(4), unit(4), unit(6)
    functions = {
        "clip": lambda u: losses.clip_info_nce(u, v, 3.0),
        "affinity": lambda u: losses.affinity_mimicking(u, v, teacher_u, teacher_v, 3.0, 5.0),
        "bank": lambda u: losses.bank_classification(u, bank, torch.arange(4), 3.0, 0.1),
        "feature": lambda u: losses.feature_distance(u, teacher_u),
    }
    u = unit(4).requires_grad_()
    assert torch.autograd.gradcheck(functions[name], (u,))


def test_no_gradient_reaches_the_teacher() -> None:
    teacher_u, teacher_v = unit(4).requires_grad_(), unit(4).requires_grad_()
    u = unit(4).requires_grad_()
    losses.affinity_mimicking(u, unit(4), teacher_u, teacher_v, 3.0, 5.0).backward()
    assert teacher_u.grad is None and teacher_v.grad is None and u.grad is not None
