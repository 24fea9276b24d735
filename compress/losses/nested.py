"""Embeddings whose first dimensions stand alone (Matryoshka, arXiv 2205.13147).

Shapes: B pairs, E embedding, K its leading dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.losses.affinity import affinity_mimicking


def nested_affinity(
    u: Tensor,
    v: Tensor,
    teacher_u: Tensor,
    teacher_v: Tensor,
    dims: tuple[int, ...],
    scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """Affinity mimicking of every prefix of the student's embeddings, made unit again, averaged.

    u, v [B, E] and the teacher's [B, E'] are unit vectors; each of `dims` is at most E. The teacher
    keeps all its dimensions. Returns a scalar.
    """
    assert dims and max(dims) <= u.shape[1], (dims, u.shape)
    parts = []
    for dim in dims:
        short_u, short_v = (F.normalize(x[:, :dim], dim=-1) for x in (u, v))
        parts.append(
            affinity_mimicking(short_u, short_v, teacher_u, teacher_v, scale, teacher_scale)
        )
    return torch.stack(parts).mean()
