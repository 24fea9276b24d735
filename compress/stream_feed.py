"""Batches streamed from webdataset shards, of plain pairs or of DataCompDR's reinforced samples.

Shapes: B pairs of the whole batch, b of this process, E embedding.
"""

import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress import parallel
from compress.batches import embed_images, embed_names, embed_texts
from compress.data import datacompdr, param_aug
from compress.data.decode import DAMAGED, decode
from compress.data.param_aug import Crops
from compress.data.shards import BadSampleError, BadSamples, Member, make_sample
from compress.data.stream import Source, expand_shards
from compress.errors import PocketclipError
from compress.feed import (
    class_names,
    masked_patches,
    own_patches,
    scale_of,
    student_tokens,
    teacher_scales,
)
from compress.learner import Batch
from compress.losses import TeacherFeatures
from compress.phases import phase_at
from compress.precision import autocast
from compress.preprocess import Preprocess, flatten
from compress.train import step_generator
from compress.work import Work

if TYPE_CHECKING:
    from compress.stages.distill import Config


class StreamSource(BaseModel):
    """Shards, and how much of each batch they make."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[str, ...]
    """Paths relative to the working directory, globs, brace ranges, https:// or pipe:COMMAND."""
    weight: float = Field(default=1.0, gt=0)
    """Share of each batch, relative to the other sources' weights."""


class Stream(BaseModel):
    """Training from shards that do not fit in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[StreamSource, ...] = ()
    """What is mixed into each batch; empty: the recipe's `data.train`."""
    samples_per_shard: int | None = Field(default=None, ge=1)
    """Taken as the size of every shard; null counts them, which reads all headers first."""
    cache: Path | None = None
    """Folder for copies of remote shards; it must hold all of them, or be emptied from outside."""
    crops: Crops = Crops()
    """Augmentation of samples that have none stored."""
    teacher_widths: tuple[int, ...] = ()
    """Embedding widths of the teachers in DataCompDR shards, in their order: 768, 768 as published.
    Empty for shards without embeddings, where the recipe's model teaches online."""
    bad_samples: int = Field(default=0, ge=0)
    """Damaged samples that may be replaced, for each process, before training stops."""
    threads: int = Field(default=4, ge=1)
    """Threads that decode and augment."""


@dataclass(frozen=True)
class Streamed:
    """One sample of a batch."""

    picture: Image.Image
    """Augmented, RGB, at the teacher's or the student's side."""
    caption: str
    entry: param_aug.Entry
    image: Image.Image
    """Not augmented, for the teacher online."""
    synthetic: str | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    v_synthetic: Tensor | None = None


Read = tuple[Streamed | None, list[str]]
"""A sample and the messages of bad ones before it; None where only bad ones are in reach."""


class StreamedBatches:
    """Reads ahead of training by one step, in threads."""

    def __init__(self, work: Work, cfg: "Config", stream: Stream) -> None:
        self.work, self.cfg, self.stream = work, cfg, stream
        given = stream.sources or (StreamSource(shards=tuple(map(str, work.data.train))),)
        self.sources = [
            Source(
                expand_shards(source.shards),
                work.seed * 1_000 + n,
                stream.cache,
                stream.samples_per_shard,
            )
            for n, source in enumerate(given)
        ]
        self.quotas = shares(cfg.batch_size, [source.weight for source in given])
        self.bad = BadSamples(stream.bad_samples)
        self.pool = ThreadPoolExecutor(stream.threads)
        Image.init()  # Pillow's formats: threads that load them together may miss some
        self.ahead: dict[int, list[Future[Read]]] = {}
        online = (work.teacher.model.config.embed_dim,)
        self.widths: tuple[int, ...] = stream.teacher_widths or online
        learnt = [scale_of(work)] * len(self.widths)
        if stream.teacher_widths and cfg.teacher_scale is None:
            raise PocketclipError("distill.teacher_scale: stored vectors do not tell it; set it")
        self.scales = teacher_scales(cfg.teacher_scale, learnt)

    @property
    def names(self) -> list[str]:
        """Those of the recipe's classes: what else the shards hold is not known before the end."""
        return class_names(self.work.data, "a stream")

    def teacher_bank(self) -> tuple[Tensor, ...]:
        """The recipe's model's embeddings of `names` [C, E]."""
        return (embed_names(self.work.teacher, self.names, list(self.work.data.templates)),)

    def at(self, step: int) -> Batch:
        """The batch of a step, a function of (seed, step) alone."""
        work, cfg = self.work, self.cfg
        futures = self.ahead.pop(step, None) or self._submit(step)
        if step + 1 < cfg.steps:
            self.ahead = {step + 1: self._submit(step + 1)}
        samples = [self._sound(future) for future in futures]
        vision = work.clip.model.config.vision
        phase = phase_at(cfg.phases, step / cfg.steps, vision)
        generator = step_generator(work.seed, step)
        keep = own_patches(phase, cfg.batch_size, vision, generator, work.device)
        masked = masked_patches(cfg, phase, vision, generator, work.device)
        pixels = torch.empty(0)
        if "image" in cfg.towers:
            pixels = self._pixels([s.picture for s in samples], phase.image_size)
        teachers, others = self._teachers(samples)
        captions = [sample.caption for sample in samples]
        second = None
        if others:
            words = [sample.synthetic or sample.caption for sample in samples]
            second = student_tokens(work, cfg, words)
        tokens = student_tokens(work, cfg, captions)
        return Batch(pixels, keep, tokens, teachers, masked, second, others)

    def _submit(self, step: int) -> list[Future[Read]]:
        places = [
            (source, step * quota + n)
            for source, quota in zip(self.sources, self.quotas, strict=True)
            for n in range(quota)
        ]
        own = places[parallel.own_rows(self.cfg.batch_size)]
        return [self.pool.submit(self._read, source, position) for source, position in own]

    def _sound(self, future: Future[Read]) -> Streamed:
        """What a thread has read. Bad samples are counted here, in the order of the batches, so
        that where training stops doesn't depend on which thread was the first.
        """
        sample, bad = future.result()
        for message in bad:
            self.bad.add(message)
        assert sample is not None, bad
        return sample

    def _read(self, source: Source, position: int) -> Read:
        """The sample at a position, or the next sound one of its shard."""
        bad: list[str] = []
        for ahead in range(self.stream.bad_samples + 1):
            place, members = source.read(position, ahead)
            try:
                chance = random.Random(repr((source.seed, position)))
                return self._sample(place.rpartition(": ")[2], members, chance), bad
            except (BadSampleError, PocketclipError, *DAMAGED) as error:
                bad.append(f"{place}: {error}")
        return None, bad

    def _sample(self, key: str, members: dict[str, bytes], chance: random.Random) -> Streamed:
        if "paug.json" in members:
            return self._reinforced(key, members, chance)
        if self.stream.teacher_widths:
            raise BadSampleError(f"{key}: no stored vectors, for which teacher_widths asks")
        found = [Member(key, suffix, f"{key}.{suffix}", c) for suffix, c in members.items()]
        own = self.work.data.captions == "own"
        sample = make_sample(key, found, needs_caption=own)
        captions = sample.captions if own else self.work.data.stand_ins
        image = flatten(sample.image, self.work.clip.preprocess.background)
        entry = self.stream.crops.draw(image.width, image.height, chance)
        return Streamed(self._view(image, entry), chance.choice(captions), entry, image)

    def _reinforced(self, key: str, members: dict[str, bytes], chance: random.Random) -> Streamed:
        record = datacompdr.parse(key, members)
        if record.image is None or record.caption is None:
            raise BadSampleError(
                f"{key}: no image or caption; join them with pocketclip store join"
            )
        image = flatten(decode(record.image), self.work.clip.preprocess.background)
        view = chance.randrange(len(record.param_aug))
        entry = record.param_aug[view]
        real = Streamed(
            self._view(image, entry), record.caption, entry, image,
            u=record.images[view], v=record.texts[0],
        )  # fmt: skip
        if not record.synthetic or self.cfg.synthetic == "none":
            return real
        name = chance.choice(sorted(record.synthetic))
        which = chance.randrange(len(record.synthetic[name]))
        words, vector = record.synthetic_texts[name][which], record.synthetic[name][which]
        if self.cfg.synthetic == "sum":
            return replace(real, synthetic=words, v_synthetic=vector)
        return replace(real, caption=words, v=vector) if chance.random() < 0.5 else real

    def _view(self, image: Image.Image, entry: param_aug.Entry) -> Image.Image:
        return _replayed(image, entry, self.work.clip.preprocess)

    def _pixels(self, pictures: Sequence[Image.Image], size: int) -> Tensor:
        contract = self.work.clip.preprocess.model_copy(update={"size": (size, size)})
        return torch.stack([contract(picture) for picture in pictures]).to(self.work.device)

    def _teachers(
        self, samples: list[Streamed]
    ) -> tuple[tuple[TeacherFeatures, ...], tuple[TeacherFeatures, ...]]:
        """Teachers of the captions, and of the synthetic ones where they count."""
        if not self.cfg.needs_teacher:
            return (), ()
        if not self.stream.teacher_widths:
            return (self._online(samples),), ()
        images = self._stacked([sample.u for sample in samples])
        real = self._features(images, self._stacked([sample.v for sample in samples]))
        if all(sample.v_synthetic is None for sample in samples):
            return real, ()
        second = [s.v if s.v_synthetic is None else s.v_synthetic for s in samples]
        return real, self._features(images, self._stacked(second))

    def _stacked(self, rows: Sequence[Tensor | None]) -> Tensor:
        found = [row for row in rows if row is not None]
        assert len(found) == len(rows)
        return torch.stack(found).to(self.work.device)

    def _features(self, images: Tensor, texts: Tensor) -> tuple[TeacherFeatures, ...]:
        parts = [datacompdr.split_teachers(x, self.widths) for x in (images, texts)]
        return tuple(
            TeacherFeatures(u, v, scale) for u, v, scale in zip(*parts, self.scales, strict=True)
        )

    @torch.no_grad()
    def _online(self, samples: list[Streamed]) -> TeacherFeatures:
        """The recipe's model sees the same views at its own size."""
        teacher, device = self.work.teacher, self.work.device
        views = [_replayed(s.image, s.entry, teacher.preprocess) for s in samples]
        pixels = torch.stack([teacher.preprocess(view) for view in views]).to(device)
        tokens = teacher.tokenizer([sample.caption for sample in samples]).to(device)
        with autocast(self.cfg.precision, device):
            u = embed_images(teacher.model.image, pixels)
            v = embed_texts(teacher.model.text, tokens)
        bias = teacher.model.logit_bias
        return TeacherFeatures(u, v, self.scales[0], 0.0 if bias is None else float(bias.detach()))


def _replayed(image: Image.Image, entry: param_aug.Entry, preprocess: Preprocess) -> Image.Image:
    return param_aug.replay(image, entry, preprocess.size[0], preprocess.interpolation)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `total` (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    found = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda n: found[n] - exact[n])
    for n in order[: total - sum(found)]:
        found[n] += 1
    return found
