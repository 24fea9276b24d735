"""The weighted losses of one batch, and the small modules that some of them train on the way.

Shapes: B pairs of the whole batch (all processes), E embedding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import losses
from compress.errors import PocketclipError
from compress.losses import TeacherFeatures
from compress.objective import EQUAL_WIDTHS, Objective, weight_at

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What the student, and whoever teaches it, made of a batch with one set of captions."""

    u: Tensor  # [B, E]
    v: Tensor  # [B, E]
    scale: Tensor | float
    bias: Tensor | float
    teachers: tuple[TeacherFeatures, ...] = ()
    momentum: tuple[Tensor, Tensor] | None = None
    masked_u: Tensor | None = None
    bank: tuple[Tensor, tuple[Tensor, ...]] | None = None
    """The student's and each teacher's embeddings of all names."""
    extra: Terms = field(default_factory=dict)
    """Losses that are not of whole embeddings, not weighted yet."""


class Parts(nn.Module):
    """Learnt helpers of losses; thrown away when training ends, saved in its checkpoints."""

    def __init__(self, cfg: Objective, width: int, teacher_widths: tuple[int, ...]) -> None:
        super().__init__()
        self.project_image = nn.ModuleList()
        self.project_text = nn.ModuleList()
        if cfg.used(*EQUAL_WIDTHS):
            for teacher_width in teacher_widths:
                self.project_image.append(_projector(width, teacher_width))
                self.project_text.append(_projector(width, teacher_width))
        start = math.log(1 / 0.07)
        self.scale = nn.ParameterDict()
        for name in ("interactive", "augmented"):
            if cfg.used(name):
                self.scale[name] = nn.Parameter(torch.tensor(start))
        self.fuse = nn.ParameterDict()
        if cfg.used("augmented"):
            total = width + teacher_widths[0]
            for side in ("image", "text"):
                self.fuse[side] = nn.Parameter(torch.randn(width, total) * total**-0.5)

    def projected(self, x: Tensor, which: int, side: str) -> Tensor:
        """x [B, E] in the width of teacher number `which`, unit length."""
        projectors = self.project_image if side == "image" else self.project_text
        projector = projectors[which]
        return x if isinstance(projector, nn.Identity) else F.normalize(projector(x), dim=-1)


def _projector(width: int, teacher_width: int) -> nn.Module:
    if width == teacher_width:
        return nn.Identity()
    return nn.Linear(width, teacher_width, bias=False)


def weighted_terms(cfg: Objective, f: Features, parts: Parts, done: float) -> Terms:
    """Each loss that counts now, times its weight; `done`: the share of steps that are over."""
    found: Terms = {}
    for name, term in TERMS.items():
        weight = weight_at(getattr(cfg, name), done)
        if weight:
            found[name] = weight * term(cfg, f, parts, done)
    for name, value in f.extra.items():
        found[name] = weight_at(getattr(cfg, name), done) * value
    return found


def _affinity(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    off_diagonal = weight_at(cfg.off_diagonal, done)
    if off_diagonal != 1:
        return losses.split_affinity(f.u, f.v, f.teachers, f.scale, off_diagonal)
    if len(f.teachers) > 1:
        return losses.multi_teacher_affinity(f.u, f.v, f.teachers, f.scale)
    t = f.teachers[0]
    return losses.affinity_mimicking(f.u, f.v, t.u, t.v, f.scale, t.scale)


def _nested(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    width, t = f.u.shape[1], f.teachers[0]
    dims = cfg.nested_dims or (width // 4, width // 2, width)
    if max(dims) > width:
        raise PocketclipError(f"distill.nested_dims: {max(dims)} is more than the width {width}")
    return losses.nested_affinity(f.u, f.v, t.u, t.v, dims, f.scale, t.scale)


def _distances(distance: Callable[[Tensor, Tensor], Tensor], f: Features, parts: Parts) -> Tensor:
    """Summed over the student's embedding width, mean over teachers."""
    values = [
        distance(parts.projected(f.u, n, "image"), t.u)
        + distance(parts.projected(f.v, n, "text"), t.v)
        for n, t in enumerate(f.teachers)
    ]
    return f.u.shape[1] * (values[0] if len(values) == 1 else torch.stack(values).mean())


def _masked_feature(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    assert f.masked_u is not None
    values = [
        losses.feature_distance(parts.projected(f.masked_u, n, "image"), t.u)
        + losses.feature_distance(parts.projected(f.v, n, "text"), t.v)
        for n, t in enumerate(f.teachers)
    ]
    return f.u.shape[1] * torch.stack(values).mean()


def _gradient(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    u, v, t = parts.projected(f.u, 0, "image"), parts.projected(f.v, 0, "text"), f.teachers[0]
    return losses.gradient_distance(u, v, t.u, t.v, f.scale, t.scale)


def _interactive(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    u, v, t = parts.projected(f.u, 0, "image"), parts.projected(f.v, 0, "text"), f.teachers[0]
    scale = parts.scale["interactive"].exp().clamp(max=100.0)
    return losses.interactive(u, v, t.u, t.v, scale)


def _augmented(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    t, scale = f.teachers[0], parts.scale["augmented"].exp().clamp(max=100.0)
    fuse = parts.fuse
    return losses.augmented_feature(f.u, f.v, t.u, t.v, fuse["image"], fuse["text"], scale)


def _hard_negatives(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    t, num = f.teachers[0], cfg.num_hard_negatives
    return losses.hard_negative_distillation(
        f.u, f.v, t.u, t.v, f.scale, t.scale, num, cfg.difficulty
    )


def _momentum(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    if f.momentum is None:  # the synthetic captions: the moving average sees the real ones only
        return f.u.new_zeros(())
    share = weight_at(cfg.momentum_share, done)
    return losses.soft_targets(f.u, f.v, *f.momentum, f.scale, share)


def _self_distillation(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    if f.momentum is None:
        return f.u.new_zeros(())
    return losses.soft_targets(f.u, f.v, *f.momentum, f.scale, 1.0)


def _hybrid(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    t, share = f.teachers[0], weight_at(cfg.hybrid_share, done)
    return losses.soft_targets(f.u, f.v, t.u, t.v, f.scale, share)


def _random_alignment(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    reference = F.normalize(torch.randn(f.u.shape, device="cpu").to(f.u.device), dim=-1)
    return losses.random_alignment(f.u, f.v, reference)


def _bank(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    if f.bank is None:  # the synthetic captions: the bank is of names
        return f.u.new_zeros(())
    student, of_teachers = f.bank
    values = [
        losses.bank_affinity(f.u, student, t.u, bank, f.scale, t.scale)
        for t, bank in zip(f.teachers, of_teachers, strict=True)
    ]
    return torch.stack(values).mean()


def _softened(cfg: Objective, f: Features, parts: Parts, done: float) -> Tensor:
    return losses.softened_info_nce(f.u, f.v, f.scale, weight_at(cfg.softening, done))


TERMS: dict[str, Callable[[Objective, Features, Parts, float], Tensor]] = {
    "clip": lambda cfg, f, parts, done: losses.clip_info_nce(f.u, f.v, f.scale),
    "affinity": _affinity,
    "feature": lambda cfg, f, parts, done: _distances(losses.feature_distance, f, parts),
    "bank": _bank,
    "nested": _nested,
    "sigmoid": lambda cfg, f, parts, done: losses.sigmoid_loss(f.u, f.v, f.scale, f.bias),
    "sigmoid_affinity": lambda cfg, f, parts, done: losses.sigmoid_affinity(
        f.u, f.v, f.teachers, f.scale, f.bias
    ),
    "divergence": lambda cfg, f, parts, done: losses.relational_divergence(
        f.u, f.v, f.teachers, f.scale
    ),
    "smooth_feature": lambda cfg, f, parts, done: _distances(
        losses.smooth_feature_distance, f, parts
    ),
    "masked_feature": _masked_feature,
    "gradient": _gradient,
    "interactive": _interactive,
    "augmented": _augmented,
    "softened": _softened,
    "hard_negatives": _hard_negatives,
    "momentum": _momentum,
    "self_distillation": _self_distillation,
    "hybrid": _hybrid,
    "random_alignment": _random_alignment,
}
