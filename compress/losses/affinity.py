"""Losses that pass on how a teacher relates images and texts: soft targets over a batch.

Shapes: B pairs, C bank entries, E embedding (teacher and student may differ unless told). `u`, `v`
are the student's image and text embeddings, `teacher_u`, `teacher_v` the teacher's, all of unit
length; scales are exp(logit_scale). No gradient reaches a teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TeacherFeatures:
    """One teacher's embeddings of a batch, and the scale at which it is read."""

    u: Tensor  # [B, E]
    v: Tensor  # [B, E]
    scale: Tensor | float
    bias: Tensor | float = 0.0


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


def multi_teacher_affinity(
    u: Tensor, v: Tensor, teachers: Sequence[TeacherFeatures], scale: Tensor | float
) -> Tensor:
    """MobileCLIP's distillation term: the mean over teachers of `affinity_mimicking`, each teacher
    at its own scale. The probabilities are averaged before one cross entropy, which is the same.
    """
    logits = scale * u @ v.T
    affinities = [(t.scale * t.u @ t.v.T).detach() for t in teachers]
    image_to_text = torch.stack([a.softmax(dim=-1) for a in affinities]).mean(dim=0)
    text_to_image = torch.stack([a.T.softmax(dim=-1) for a in affinities]).mean(dim=0)
    return (F.cross_entropy(logits, image_to_text) + F.cross_entropy(logits.T, text_to_image)) / 2


def split_affinity(
    u: Tensor,
    v: Tensor,
    teachers: Sequence[TeacherFeatures],
    scale: Tensor | float,
    off_diagonal: float,
) -> Tensor:
    """`multi_teacher_affinity` with the part that falls on negatives weighted apart (after DARK).

    off_diagonal 1 is the whole loss, 0 keeps the positives' part, below 0 pushes away from the
    teacher's opinion of negatives, as DARK ends when teacher and student differ much in size.
    """
    logits = scale * u @ v.T
    own = torch.eye(len(u), device=u.device, dtype=u.dtype)
    weight = own + off_diagonal * (1 - own)
    total = u.new_zeros(())
    for teacher in teachers:
        affinity = (teacher.scale * teacher.u @ teacher.v.T).detach()
        for target, student in ((affinity, logits), (affinity.T, logits.T)):
            probability = target.softmax(dim=-1) * weight
            total = total - (probability * student.log_softmax(dim=-1)).sum() / len(u)
    return total / (2 * len(teachers))


def relational_divergence(
    u: Tensor, v: Tensor, teachers: Sequence[TeacherFeatures], scale: Tensor | float
) -> Tensor:
    """CLIP-KD's CRD: KL(teacher || student) of both directions, averaged; mean over teachers.

    Its gradient is affinity mimicking's; its value is 0 where student and teacher agree.
    """
    logits = scale * u @ v.T
    total = u.new_zeros(())
    for teacher in teachers:
        affinity = (teacher.scale * teacher.u @ teacher.v.T).detach()
        for target, student in ((affinity, logits), (affinity.T, logits.T)):
            log_target = target.log_softmax(dim=-1)
            log_student = student.log_softmax(dim=-1)
            total = total + F.kl_div(
                log_student, log_target, reduction="batchmean", log_target=True
            )
    return total / (2 * len(teachers))


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


def sigmoid_affinity(
    u: Tensor,
    v: Tensor,
    teachers: Sequence[TeacherFeatures],
    scale: Tensor | float,
    bias: Tensor | float,
) -> Tensor:
    """Distillation of a sigmoid model: binary cross entropy from the teacher's probability of each
    of the B x B pairs to the student's, mean over pairs and teachers.
    """
    logits = scale * u @ v.T + bias
    targets = [torch.sigmoid(t.scale * t.u @ t.v.T + t.bias).detach() for t in teachers]
    return F.binary_cross_entropy_with_logits(logits, torch.stack(targets).mean(dim=0))


def interactive(
    u: Tensor, v: Tensor, teacher_u: Tensor, teacher_v: Tensor, scale: Tensor | float
) -> Tensor:
    """CLIP-KD's ICL: InfoNCE of student anchors against teacher keys, of equal embedding width."""
    target = torch.arange(len(u), device=u.device)
    image_to_text = F.cross_entropy(scale * u @ teacher_v.detach().T, target)
    return (image_to_text + F.cross_entropy(scale * v @ teacher_u.detach().T, target)) / 2


def soft_targets(
    u: Tensor,
    v: Tensor,
    teacher_u: Tensor,
    teacher_v: Tensor,
    scale: Tensor | float,
    share: float,
) -> Tensor:
    """InfoNCE towards share x (another model's affinities) + (1 - share) x (the right pairs).

    ALBEF's momentum distillation where the other model is the student's own moving average;
    CLIP-Refine's hybrid contrastive distillation where it is the model that training started from
    (our formulation of both). share 0 is InfoNCE, share 1 self-distillation. Both models are read
    at the student's scale.
    """
    logits = scale * u @ v.T
    other = (scale * teacher_u @ teacher_v.T).detach()
    own = torch.eye(len(u), device=u.device, dtype=u.dtype)
    image_to_text = share * other.softmax(dim=-1) + (1 - share) * own
    text_to_image = share * other.T.softmax(dim=-1) + (1 - share) * own
    return (F.cross_entropy(logits, image_to_text) + F.cross_entropy(logits.T, text_to_image)) / 2
