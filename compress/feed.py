"""What a step of distillation learns from: pairs, captions and augmentation, with the teacher's
embeddings of them, as a function of (seed, step) alone.

Shapes: B pairs of the whole batch, b of this process, E embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Generator, Tensor

from compress import parallel
from compress.batches import Sampler, embed_images, embed_names, embed_texts
from compress.data.augment import replay
from compress.data.store import EmbeddingStore, open_store
from compress.errors import PocketclipError
from compress.learner import Batch
from compress.losses import TeacherFeatures
from compress.phases import Phase, kept_patches, phase_at
from compress.precision import autocast
from compress.preprocess import Preprocess
from compress.structure import UpstreamVision, VisionConfig
from compress.train import step_generator
from compress.work import Data, Work

if TYPE_CHECKING:
    from compress.stages.distill import Config

Vision = VisionConfig | UpstreamVision


class Feed(Protocol):
    """A source of batches."""

    widths: tuple[int, ...]
    """Embedding widths of the teachers."""

    @property
    def names(self) -> list[str]:
        """What the loss `bank` ranks."""
        ...

    def teacher_bank(self) -> tuple[Tensor, ...]:
        """Each teacher's embeddings of `names` [C, E]."""
        ...

    def at(self, step: int) -> Batch:
        """The batch of a step, a function of (seed, step) alone."""
        ...


def open_feed(work: Work, cfg: "Config", out: Path) -> "Feed":
    """The source that the settings ask for."""
    if cfg.stream is not None:
        from compress.stream_feed import StreamedBatches

        return StreamedBatches(work, cfg, cfg.stream)
    if cfg.teacher == "reinforced":
        from compress.reinforced_feed import ReinforcedBatches

        return ReinforcedBatches(work, cfg, Sampler(work.data.pairs))
    return Batches(work, cfg, Sampler(work.data.pairs), out)


class Batches:
    """Pairs in memory, and the recipe's model as the teacher: online, or stored before training."""

    def __init__(self, work: Work, cfg: "Config", sampler: Sampler, out: Path) -> None:
        self.work, self.cfg, self.sampler = work, cfg, sampler
        self.store: EmbeddingStore | None = None
        self.widths: tuple[int, ...] = (work.teacher.model.config.embed_dim,)
        self.scale = teacher_scales(cfg.teacher_scale, [scale_of(work)])[0]
        if cfg.languages:
            check_languages(sampler, cfg.languages)
        if cfg.needs_teacher and cfg.teacher == "stored":
            self.store = open_store(out / "store", work, cfg.augment, cfg.views)

    @property
    def names(self) -> list[str]:
        if self.work.data.captions == "none":
            return class_names(self.work.data, "pictures alone")
        return self.sampler.names

    def teacher_bank(self) -> tuple[Tensor, ...]:
        return (embed_names(self.work.teacher, self.names, list(self.work.data.templates)),)

    def at(self, step: int) -> Batch:
        work, cfg, student = self.work, self.cfg, self.work.clip
        generator = step_generator(work.seed, step)
        indices, _ = self.sampler.draw(cfg.batch_size, generator)
        captions = self.sampler.captions(indices, generator)
        own = parallel.own_rows(len(indices))
        teacher_u = None
        if self.store is not None:
            view = torch.randint(cfg.views, (len(indices),), generator=generator)
            parameters = self.store.parameters[indices, view]
            teacher_u = self.store.images[indices, view][own].float().to(work.device)
        else:
            parameters = cfg.augment.draw(len(indices), generator)
        vision = student.model.config.vision
        phase = phase_at(cfg.phases, step / cfg.steps, vision)
        keep = own_patches(phase, len(indices), vision, generator, work.device)
        views = Views.of_rows(work, cfg, indices, parameters, own, generator)
        indices, captions = indices[own], captions[own]
        pixels = torch.empty(0)
        if "image" in cfg.towers:
            pixels = views.pixels(phase.image_size, student.preprocess)
        teachers: tuple[TeacherFeatures, ...] = ()
        if cfg.needs_teacher:
            if teacher_u is None:
                teacher_u = self._teacher_images(views)
            teacher_v = self._teacher_texts(captions)
            bias = work.teacher.model.logit_bias
            fixed = 0.0 if bias is None else float(bias.detach())
            teachers = (TeacherFeatures(teacher_u, teacher_v, self.scale, fixed),)
        if cfg.languages:
            captions = translated(self.sampler, indices, captions, cfg.languages, generator, own)
        masked = masked_patches(cfg, phase, vision, generator, work.device)
        tokens = student_tokens(work, cfg, captions)
        return Batch(pixels, keep, tokens, teachers, masked)

    @torch.no_grad()
    def _teacher_images(self, views: "Views") -> Tensor:
        teacher = self.work.teacher
        pixels = views.pixels(teacher.model.config.vision.image_size, teacher.preprocess)
        with autocast(self.cfg.precision, self.work.device):
            return embed_images(teacher.model.image, pixels)

    @torch.no_grad()
    def _teacher_texts(self, captions: list[str]) -> Tensor:
        if self.store is not None:
            rows = [self.store.rows[caption] for caption in captions]
            return self.store.texts[rows].float().to(self.work.device)
        teacher = self.work.teacher
        return embed_texts(teacher.model.text, teacher.tokenizer(captions).to(self.work.device))


@dataclass(frozen=True)
class Views:
    """This process's pictures of a step as they are augmented and, where asked for, blended."""

    images: Tensor  # uint8 [b, 4, S, S]; blended ones are followed by their last one's partner
    parameters: Tensor  # [b, P], or [b + 1, P]
    shares: Tensor | None = None  # [b]: how much of a picture is the next one's

    @classmethod
    def of_rows(
        cls,
        work: Work,
        cfg: "Config",
        indices: Tensor,
        parameters: Tensor,
        own: slice,
        generator: Generator,
    ) -> "Views":
        """The rows `own` of the whole batch's pairs [B] and augmentations [B, P]."""
        rows, shares = torch.arange(len(indices))[own], None
        if cfg.blend:
            blended = torch.rand(len(indices), generator=generator) < cfg.blend
            shares = torch.rand(len(indices), generator=generator) * blended
            shares = shares[own].to(work.device)
            rows = torch.cat([rows, (rows[-1:] + 1) % len(indices)])
        images = work.data.pairs.images[indices[rows]].to(work.device)
        return cls(images, parameters[rows].to(work.device), shares)

    def pixels(self, size: int, preprocess: Preprocess) -> Tensor:
        """As a model sees them: [b, 3, size, size]."""
        found = replay(self.images, self.parameters, size, preprocess)
        if self.shares is None:
            return found
        return torch.lerp(found[:-1], found[1:], self.shares[:, None, None, None])


def student_tokens(work: Work, cfg: "Config", captions: list[str]) -> Tensor:
    """The captions as the student reads them [b, L]; nothing [0] where its text tower rests."""
    if "text" not in cfg.towers:
        return torch.empty(0)
    return work.clip.tokenizer(captions).to(work.device)


def scale_of(work: Work) -> float:
    """The scale that the recipe's model has learnt."""
    return float(work.teacher.model.logit_scale.detach().exp())


def teacher_scales(
    given: float | Sequence[float] | None, learnt: Sequence[float]
) -> tuple[float, ...]:
    """One scale for each teacher: the recipe's, or their own."""
    if given is None:
        return tuple(learnt)
    scales = [given] * len(learnt) if isinstance(given, float) else list(given)
    if len(scales) != len(learnt):
        raise PocketclipError(
            f"distill.teacher_scale: {len(scales)} scales for {len(learnt)} teachers; give one for "
            "each, or one for all"
        )
    return tuple(scales)


def masked_patches(
    cfg: "Config", phase: Phase, vision: Vision, generator: Generator, device: str
) -> Tensor | None:
    """This process's patches to keep for `masked_feature`: [b, M]; None where it is not used."""
    if not cfg.used("masked_feature"):
        return None
    sparse = phase.model_copy(update={"keep": 1 - cfg.mask_share})
    kept = kept_patches(sparse, cfg.batch_size, vision, generator)
    return None if kept is None else kept[parallel.own_rows(cfg.batch_size)].to(device)


def own_patches(
    phase: Phase, num: int, vision: Vision, generator: Generator, device: str
) -> Tensor | None:
    """This process's share of the random patches that a phase keeps: [b, M], or None for all."""
    keep = kept_patches(phase, num, vision, generator)
    return None if keep is None else keep[parallel.own_rows(num)].to(device)


def class_names(data: Data, source: str) -> list[str]:
    """The names that `bank` ranks where the training pairs of a `source` tell none."""
    if data.classes_file is None:
        raise PocketclipError(
            f"distill.bank: with {source} its names come from data.classes: name a class file "
            "there, or set bank to 0"
        )
    return [name for _, name in data.classes]


def check_languages(sampler: Sampler, languages: Sequence[str]) -> None:
    """Refuse a language that no training pair has a label in."""
    known = {language for labels in sampler.pairs.labels for language in labels}
    missing = [language for language in languages if language not in known | {"en"}]
    if missing:
        raise PocketclipError(
            f"distill.languages: no training pair has labels in {', '.join(missing)} (there is: "
            f"{', '.join(sorted(known)) or 'nothing'})"
        )


def translated(
    sampler: Sampler,
    indices: Tensor,
    captions: list[str],
    languages: Sequence[str],
    generator: Generator,
    own: slice,
) -> list[str]:
    """The student's captions in a random language each; `en`, or no label, keeps the caption."""
    draw = torch.randint(len(languages), (own.stop + 1,), generator=generator)  # same for all
    chosen = draw[: len(captions)].tolist()
    labels = [sampler.pairs.labels[index] for index in indices.tolist()]
    return [
        label.get(languages[n], caption)
        for label, caption, n in zip(labels, captions, chosen, strict=True)
    ]
