"""Losses that compare embeddings with a teacher's embeddings, gradients or random references.

Shapes: B pairs, E embedding. All embeddings are of unit length, and of equal width where compared:
the caller projects the student's where they differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.losses.contrastive import clip_info_nce


def feature_distance(x: Tensor, teacher_x: Tensor) -> Tensor:
    """CLIP-KD's FD for one tower: mean squared error over the elements. [B, E] each -> scalar."""
    return F.mse_loss(x, teacher_x)


def smooth_feature_distance(x: Tensor, teacher_x: Tensor) -> Tensor:
    """DC-CLIP's first stage for one tower: smooth L1, mean over the elements."""
    return F.smooth_l1_loss(x, teacher_x)


def info_nce_gradients(u: Tensor, v: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """The derivatives of `clip_info_nce` by u and by v, in closed form. [B, E] each -> twice that.

    With P = softmax(scale u v^T) over texts and Q the softmax over images:
    dL/du_i = scale / 2B (sum_j (P_ij + Q_ij) v_j - 2 v_i), and the same for v with u.
    """
    logits = scale * u @ v.T
    mixed = logits.softmax(dim=1) + logits.softmax(dim=0)  # [B, B]
    factor = scale / (2 * len(u))
    return factor * (mixed @ v - 2 * v), factor * (mixed.T @ u - 2 * u)


def gradient_distance(
    u: Tensor,
    v: Tensor,
    teacher_u: Tensor,
    teacher_v: Tensor,
    scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """CLIP-KD's GD: mean squared difference of the InfoNCE gradients of student and teacher."""
    own = info_nce_gradients(u, v, scale)
    target = info_nce_gradients(teacher_u.detach(), teacher_v.detach(), teacher_scale)
    return F.mse_loss(own[0], target[0]) + F.mse_loss(own[1], target[1])


def augmented_feature(
    u: Tensor,
    v: Tensor,
    teacher_u: Tensor,
    teacher_v: Tensor,
    fuse_image: Tensor,
    fuse_text: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """CLIP-KD's AFD: InfoNCE of student and teacher embeddings fused by a learnt matrix.

    fuse_image, fuse_text [F, E_student + E_teacher] map the concatenation to F dimensions.
    """
    image = F.normalize(torch.cat([u, teacher_u.detach()], dim=1) @ fuse_image.T, dim=-1)
    text = F.normalize(torch.cat([v, teacher_v.detach()], dim=1) @ fuse_text.T, dim=-1)
    return clip_info_nce(image, text, scale)


def random_alignment(u: Tensor, v: Tensor, reference: Tensor) -> Tensor:
    """CLIP-Refine's random feature alignment, our formulation: both embeddings of a pair are drawn
    to one random reference, which narrows the gap between the modalities.

    reference [B, E]: a draw from the prior for each pair, of unit length as the embeddings are.
    """
    distance = (u - reference).square().sum(dim=-1) + (v - reference).square().sum(dim=-1)
    return distance.mean() / 2
