"""Contrastive losses on unit embeddings.

Shapes: B pairs, C bank entries, K hard negatives, E embedding (teacher and student may differ).
`u`, `v` are the student's image and text embeddings, `teacher_u`, `teacher_v` the teacher's, all of
unit length; scales are exp(logit_scale).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_info_nce(u: Tensor, v: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE (CLIP): the i-th text belongs to the i-th image. u, v [B, E] -> scalar."""
    logits = scale * u @ v.T  # [B, B]
    target = torch.arange(len(u), device=u.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(u: Tensor, v: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """SigLIP: each of the B x B pairs is a yes-or-no question; sum over a row, mean over rows."""
    logits = scale * u @ v.T + bias  # [B, B]
    signs = 2 * torch.eye(len(u), device=u.device, dtype=u.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(u)


def bank_classification(
    u: Tensor, bank: Tensor, target: Tensor, scale: Tensor | float, smoothing: float = 0.0
) -> Tensor:
    """Image-to-text cross entropy over a bank of all names. u [B, E], bank [C, E], target [B]."""
    return F.cross_entropy(scale * u @ bank.T, target, label_smoothing=smoothing)


def softened_info_nce(u: Tensor, v: Tensor, scale: Tensor | float, rho: float) -> Tensor:
    """LightCLIP's label softening, our formulation: InfoNCE whose targets leave rho to negatives.

    The negatives share rho by the softmax of the student's own logits, without gradient; rho in
    [0, 1) is ramped up by the caller. rho = 0 is `clip_info_nce`. [B, E] each -> scalar.
    """
    logits = scale * u @ v.T
    return (_softened(logits, rho) + _softened(logits.T, rho)) / 2


def _softened(logits: Tensor, rho: float) -> Tensor:
    own = torch.eye(len(logits), device=logits.device, dtype=torch.bool)
    others = logits.detach().masked_fill(own, float("-inf")).softmax(dim=-1)
    return F.cross_entropy(logits, rho * others + (1 - rho) * own)


def hard_negative_distillation(
    u: Tensor,
    v: Tensor,
    teacher_u: Tensor,
    teacher_v: Tensor,
    scale: Tensor | float,
    teacher_scale: Tensor | float,
    num_negatives: int,
    difficulty: float,
) -> Tensor:
    """Dynamic contrastive distillation (DCD) for dual encoders, our formulation.

    The teacher picks the K hardest negatives of each anchor. Over {positive, K negatives}: cross
    entropy towards the positive plus KL(teacher || student), each anchor weighted by
    (1 - p_student(positive)) ** difficulty without gradient, weights normalised to mean 1.
    K is cut to B - 1; both directions are averaged. [B, E] each -> scalar.
    """
    logits = scale * u @ v.T
    teacher = (teacher_scale * teacher_u @ teacher_v.T).detach()
    k = min(num_negatives, len(u) - 1)
    image_to_text = _over_hard_negatives(logits, teacher, k, difficulty)
    return (image_to_text + _over_hard_negatives(logits.T, teacher.T, k, difficulty)) / 2


def _over_hard_negatives(logits: Tensor, teacher: Tensor, k: int, difficulty: float) -> Tensor:
    own = torch.eye(len(logits), device=logits.device, dtype=torch.bool)
    negatives = teacher.masked_fill(own, float("-inf")).topk(k, dim=-1).indices  # [B, K]
    first = torch.arange(len(logits), device=logits.device)[:, None]
    candidates = torch.cat([first, negatives], dim=1)  # the positive is column 0
    student = logits.gather(1, candidates).log_softmax(dim=-1)
    target = teacher.gather(1, candidates).log_softmax(dim=-1)
    divergence = (target.exp() * (target - student)).sum(dim=-1)  # [B]
    weight = (1 - student[:, 0].detach().exp()).clamp(min=0) ** difficulty
    weight = weight / weight.mean().clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight * (divergence - student[:, 0])).mean()
