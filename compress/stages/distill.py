"""Distillation: the student learns to relate images and texts as its teacher does.

The default is TinyCLIP's affinity mimicking with both scales fixed; a hard CLIP term, feature
distance (CLIP-KD's FD) and affinity to a bank of all names can be added, each by its weight.
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress import losses
from compress.batches import NameBank, Sampler, embed_images, embed_names, embed_texts
from compress.clip import Clip
from compress.data.augment import Augment, replay
from compress.data.store import EmbeddingStore, open_store
from compress.errors import PocketclipError
from compress.phases import Phase, check_phases, kept_patches, phase_at
from compress.train import Training, autocast, bank_fits_checkpoints, fit, step_generator
from compress.work import Work

VERSION = 1


class Config(Training):
    """Settings of the distill stage, beside those of the training loop."""

    affinity: float = Field(default=1.0, ge=0)
    """Weight of affinity mimicking within the batch (TinyCLIP); 0 costs nothing."""
    clip: float = Field(default=0.0, ge=0)
    """Weight of the hard CLIP loss; TinyCLIP's recipes have none. With all other weights 0 the
    teacher is not used."""
    feature: float = Field(default=0.0, ge=0)
    """Weight of the squared distance to the teacher's embeddings, summed over the embedding width
    (CLIP-KD's FD times that width); needs equal embedding widths."""
    bank: float = Field(default=0.0, ge=0)
    """Weight of image-to-text affinity over a bank of all training names (our addition)."""
    bank_every: int = Field(default=50, ge=1)
    """Steps between refreshes of the student's bank; divides checkpoint_every."""
    scale: float | None = Field(default=50.0, gt=0)
    """Fixed logit scale of the student, TinyCLIP's 50; null learns it from the teacher's."""
    teacher_scale: float | None = Field(default=50.0, gt=0)
    """Fixed logit scale of the teacher; null takes the teacher's own."""
    teacher: Literal["online", "stored"] = "stored"
    """online: the teacher embeds each step's images. stored: it embeds `views` augmentations of
    each image once, before training; the student replays those augmentations."""
    views: int = Field(default=4, ge=1)
    """Stored augmentations of each image."""
    augment: Augment = Augment()
    """How strongly the images vary, the same for teacher and student."""
    template_captions: bool = False
    """Whether each training pair also has its name in every template of `data.templates` as a
    caption, so that the student reads the prompts it will be asked with."""
    phases: tuple[Phase, ...] = ()
    """The student's resolutions over time; the teacher always sees its own."""

    @model_validator(mode="after")
    def _resume_is_exact(self) -> "Config":
        return bank_fits_checkpoints(self, self.bank_every)

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Config":
        if not (self.affinity or self.clip or self.feature or self.bank):
            raise ValueError("affinity, clip, feature and bank are all 0: nothing to learn from")
        return self

    @property
    def needs_teacher(self) -> bool:
        return bool(self.affinity or self.feature or self.bank)


@dataclass(frozen=True)
class Batch:
    """One step's inputs: pixels [B, 3, S, S], kept patches [B, M], tokens [B, L], and the teacher's
    unit embeddings [B, E]."""

    pixels: Tensor
    keep: Tensor | None
    tokens: Tensor
    teacher_u: Tensor | None
    teacher_v: Tensor | None


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Train a copy of `work.clip` to mimic `work.teacher`, which may be the same model; continues
    from a checkpoint in `out`."""
    if cfg.template_captions:
        work = replace(work, data=work.data.prompted())
    student = replace(work.clip, model=copy.deepcopy(work.clip.model))
    teacher = work.teacher
    student.model.to(work.device)
    teacher.model.to(work.device)
    if cfg.feature and student.model.config.embed_dim != teacher.model.config.embed_dim:
        raise PocketclipError(
            f"distill.feature: the student's embedding width {student.model.config.embed_dim} is "
            f"not the teacher's {teacher.model.config.embed_dim}; set it to 0"
        )
    check_phases(cfg.phases, student.model.config.vision, "distill")
    sampler = Sampler(work.data.pairs)
    batches = Batches(replace(work, clip=student), cfg, sampler, out)
    names = sampler.names if cfg.bank else []
    templates = list(work.data.templates)
    bank = NameBank(student, names, templates, cfg.bank_every)
    teacher_bank = embed_names(teacher, names, templates) if cfg.bank else torch.zeros(0)
    teacher_scale = cfg.teacher_scale or float(teacher.model.logit_scale.detach().exp())
    _start_scale(student, teacher, cfg)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = batches.at(step)
        names_bank = bank.at(step)
        with autocast(cfg, work.device):
            u = embed_images(student.model.image, batch.pixels, batch.keep)
            v = embed_texts(student.model.text, batch.tokens)
        scale = cfg.scale or student.model.logit_scale.exp().clamp(max=100.0)
        terms: dict[str, Tensor] = {}
        if cfg.clip:
            terms["clip"] = cfg.clip * losses.clip_info_nce(u, v, scale)
        if batch.teacher_u is not None and batch.teacher_v is not None:
            t_u, t_v = batch.teacher_u, batch.teacher_v
            if cfg.affinity:
                value = losses.affinity_mimicking(u, v, t_u, t_v, scale, teacher_scale)
                terms["affinity"] = cfg.affinity * value
            if cfg.feature:
                value = losses.feature_distance(u, t_u) + losses.feature_distance(v, t_v)
                terms["feature"] = cfg.feature * u.shape[1] * value
            if cfg.bank:
                value = losses.bank_affinity(u, names_bank, t_u, teacher_bank, scale, teacher_scale)
                terms["bank"] = cfg.bank * value
        figures = {name: float(term.detach()) for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum(), figures

    fit(student.model, step_loss, cfg, work.seed, out)
    student.model.cpu()
    teacher.model.cpu()
    step = {"step": "distill", "teacher": teacher.name, "data": work.data.digest}
    return replace(work, clip=student.with_model(student.model, step))


class Batches:
    """The step's pairs, captions and augmentation, with the teacher's embeddings of them."""

    def __init__(self, work: Work, cfg: Config, sampler: Sampler, out: Path) -> None:
        self.work, self.cfg, self.sampler = work, cfg, sampler
        self.store: EmbeddingStore | None = None
        if cfg.needs_teacher and cfg.teacher == "stored":
            self.store = open_store(out / "store", work, cfg.augment, cfg.views)

    def at(self, step: int) -> Batch:
        """The batch of a step, a function of (seed, step) alone."""
        work, cfg, student = self.work, self.cfg, self.work.clip
        generator = step_generator(work.seed, step)
        indices, _ = self.sampler.draw(cfg.batch_size, generator)
        captions = self.sampler.captions(indices, generator)
        tokens = student.tokenizer(captions).to(work.device)
        teacher_u = teacher_v = None
        if self.store is not None:
            view = torch.randint(cfg.views, (len(indices),), generator=generator)
            parameters = self.store.parameters[indices, view]
            teacher_u = self.store.images[indices, view].float().to(work.device)
        else:
            parameters = cfg.augment.draw(len(indices), generator)
        vision = student.model.config.vision
        phase = phase_at(cfg.phases, step / cfg.steps, vision)
        keep = kept_patches(phase, len(indices), vision, generator)
        images, parameters = work.data.pairs.images[indices], parameters.to(work.device)
        images = images.to(work.device)
        pixels = replay(images, parameters, phase.image_size, student.preprocess)
        if cfg.needs_teacher:
            if teacher_u is None:
                teacher_u = self._teacher_images(images, parameters)
            teacher_v = self._teacher_texts(captions)
        keep = None if keep is None else keep.to(work.device)
        return Batch(pixels, keep, tokens, teacher_u, teacher_v)

    @torch.no_grad()
    def _teacher_images(self, images: Tensor, parameters: Tensor) -> Tensor:
        teacher = self.work.teacher
        size = teacher.model.config.vision.image_size
        with autocast(self.cfg, self.work.device):
            return embed_images(
                teacher.model.image, replay(images, parameters, size, teacher.preprocess)
            )

    @torch.no_grad()
    def _teacher_texts(self, captions: list[str]) -> Tensor:
        if self.store is not None:
            rows = [self.store.rows[caption] for caption in captions]
            return self.store.texts[rows].float().to(self.work.device)
        teacher = self.work.teacher
        return embed_texts(teacher.model.text, teacher.tokenizer(captions).to(self.work.device))


def _start_scale(student: Clip, teacher: Clip, cfg: Config) -> None:
    """Fix the student's logit scale, or start it from the teacher's."""
    with torch.no_grad():
        if cfg.scale is not None:
            student.model.logit_scale.fill_(math.log(cfg.scale))
        else:
            student.model.logit_scale.copy_(teacher.model.logit_scale)
