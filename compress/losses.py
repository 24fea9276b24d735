"""Losses as pure functions of unit embeddings.

Shapes: B pairs, C bank entries, E embedding (teacher and student may differ). `u`, `v` are the
student's image and text embeddings, `teacher_u`, `teacher_v` the teacher's, all of unit length;
scales are exp(logit_scale).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_info_nce(u: Tensor, v: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE (CLIP): the i-th text belongs to the i-th image. u, v [B, E] -> scalar."""
    logits = scale * u @ v.T  # [B, B]
    target = torch.arange(len(u), device=u.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def affinity_mimicking(
    u: Tensor,
    v: Tensor,
    teacher_u: Tensor,
    teacher_v: Tensor,
    scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """TinyCLIP's affinity mimicking: cross entropy from the teacher's image-to-text and
    text-to-image affinities to the student's, the two directions averaged. [B, E] each -> scalar.
    """
    logits = scale * u @ v.T
    teacher_logits = (teacher_scale * teacher_u @ teacher_v.T).detach()
    image_to_text = F.cross_entropy(logits, teacher_logits.softmax(dim=-1))
    text_to_image = F.cross_entropy(logits.T, teacher_logits.T.softmax(dim=-1))
    return (image_to_text + text_to_image) / 2


def bank_affinity(
    x: Tensor,
    bank: Tensor,
    teacher_x: Tensor,
    teacher_bank: Tensor,
    scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """Affinity mimicking of one tower against a bank of texts or images, one direction.

    x [B, E], bank [C, E] -> scalar. The bank holds more candidates than a batch does, at the price
    of one matrix product; its embeddings may be a few steps old.
    """
    teacher = (teacher_scale * teacher_x @ teacher_bank.T).softmax(dim=-1).detach()
    return F.cross_entropy(scale * x @ bank.T, teacher)


def feature_distance(x: Tensor, teacher_x: Tensor) -> Tensor:
    """CLIP-KD's FD for one tower: mean squared error over the elements. [B, E] each -> scalar."""
    return F.mse_loss(x, teacher_x)


def bank_classification(
    u: Tensor, bank: Tensor, target: Tensor, scale: Tensor | float, smoothing: float = 0.0
) -> Tensor:
    """Image-to-text cross entropy over a bank of all names. u [B, E], bank [C, E], target [B]."""
    return F.cross_entropy(scale * u @ bank.T, target, label_smoothing=smoothing)
