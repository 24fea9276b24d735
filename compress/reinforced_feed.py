"""Batches from a reinforced store: pairs in memory, teachers' vectors and augmentation from disk.

Shapes: B pairs of the whole batch, b of this process, E embedding.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress import parallel
from compress.batches import Sampler
from compress.data import augment, name_bank, param_aug
from compress.data.reinforced import Store, open_store
from compress.errors import PocketclipError
from compress.feed import masked_patches, own_patches, student_tokens, teacher_scales
from compress.learner import Batch
from compress.losses import TeacherFeatures
from compress.phases import phase_at
from compress.preprocess import flatten
from compress.train import step_generator
from compress.work import Work

if TYPE_CHECKING:
    from compress.stages.distill import Config


class ReinforcedBatches:
    """Replays a stored view of each image; teachers never run."""

    def __init__(self, work: Work, cfg: "Config", sampler: Sampler) -> None:
        self.work, self.cfg, self.sampler = work, cfg, sampler
        self.store = matching_store(work, cfg)
        teachers = self.store.identity.teachers
        self.widths: tuple[int, ...] = tuple(teacher.embed_dim for teacher in teachers)
        self.scales = teacher_scales(cfg.teacher_scale, [t.logit_scale for t in teachers])
        self.biases = [teacher.logit_bias for teacher in teachers]

    @property
    def names(self) -> list[str]:
        """Those of all training concepts."""
        return self.sampler.names

    def teacher_bank(self) -> tuple[Tensor, ...]:
        """Each teacher's embeddings of `names` [C, E], from the store."""
        banks = name_bank.read(self.store.folder, self.store.identity.digest, self.names)
        return tuple(bank.to(self.work.device) for bank in banks)

    def at(self, step: int) -> Batch:
        """The batch of a step, a function of (seed, step) alone."""
        work, cfg = self.work, self.cfg
        generator = step_generator(work.seed, step)
        indices, _ = self.sampler.draw(cfg.batch_size, generator)
        views = torch.randint(self.store.identity.views, (len(indices),), generator=generator)
        draws = torch.rand(3, len(indices), generator=generator)
        vision = work.clip.model.config.vision
        phase = phase_at(cfg.phases, step / cfg.steps, vision)
        keep = own_patches(phase, len(indices), vision, generator, work.device)
        masked = masked_patches(cfg, phase, vision, generator, work.device)
        own = parallel.own_rows(len(indices))
        indices, views, draws = indices[own], views[own], draws[:, own]
        keys = [work.data.pairs.keys[index] for index in indices.tolist()]
        real, synthetic = self._captions(keys, draws)
        texts = self._words(keys, real)
        pixels = torch.empty(0)
        if "image" in cfg.towers:
            pixels = self._pixels(indices, keys, views, phase.image_size)
        second: Tensor | None = None
        others: tuple[TeacherFeatures, ...] = ()
        if synthetic is not None:
            second = student_tokens(work, cfg, self._words(keys, synthetic))
            others = self._teachers(keys, views, synthetic)
        return Batch(
            pixels,
            keep,
            student_tokens(work, cfg, texts),
            self._teachers(keys, views, real),
            masked,
            second,
            others,
        )

    def _captions(self, keys: list[str], draws: Tensor) -> tuple[list[int], list[int] | None]:
        """Which caption of each sample, and which synthetic one; draws [3, b] in 0-1."""
        samples = [self.store.sample(key) for key in keys]
        first, second, swap = draws.tolist()
        real = [int(w * len(s.captions)) for s, w in zip(samples, first, strict=True)]
        if self.cfg.synthetic == "none" or not any(s.synthetic for s in samples):
            return real, None
        generated = [
            len(s.captions) + int(w * len(s.synthetic)) if s.synthetic else r
            for s, w, r in zip(samples, second, real, strict=True)
        ]
        if self.cfg.synthetic == "sum":
            return real, generated
        return [g if w < 0.5 else r for g, r, w in zip(generated, real, swap, strict=True)], None

    def _words(self, keys: list[str], which: list[int]) -> list[str]:
        samples = (self.store.sample(key) for key in keys)
        return [(s.captions + s.synthetic)[n] for s, n in zip(samples, which, strict=True)]

    def _teachers(
        self, keys: list[str], views: Tensor, captions: list[int]
    ) -> tuple[TeacherFeatures, ...]:
        device = self.work.device
        return tuple(
            TeacherFeatures(
                self.store.images(k, keys, views).to(device),
                self.store.texts(k, keys, captions).to(device),
                self.scales[k],
                self.biases[k],
            )
            for k in range(len(self.widths))
        )

    def _pixels(self, indices: Tensor, keys: list[str], views: Tensor, size: int) -> Tensor:
        """The stored views, seen through the student's preprocessing: [b, 3, size, size]."""
        pairs, preprocess = self.work.data.pairs, self.work.clip.preprocess
        if self.store.identity.transform["kind"] == "augment":
            images = pairs.images[indices].to(self.work.device)
            parameters = self.store.parameters(keys, views).to(self.work.device)
            return augment.replay(images, parameters, size, preprocess)
        contract = preprocess.model_copy(update={"size": (size, size)})
        found = []
        for index, key, view in zip(indices.tolist(), keys, views.tolist(), strict=True):
            crops = self.store.sample(key).crops
            assert crops is not None, key
            picture = flatten(pairs.image(index), preprocess.background)
            mode = preprocess.interpolation
            found.append(contract(param_aug.replay(picture, crops[view], size, mode)))
        return torch.stack(found).to(self.work.device)


def matching_store(work: Work, cfg: "Config") -> Store:
    """The store of this run or of the recipe, if it is of these very data; refused otherwise."""
    folder: Path | None = cfg.store or work.store
    if folder is None:
        raise PocketclipError(
            "distill.teacher: reinforced needs a store: put a reinforce stage before, or name one "
            "with `store:`"
        )
    store = open_store(folder)
    identity = store.identity
    wrong = []
    if identity.data != work.data.digest:
        wrong.append("data")
    if identity.transform.get("image_size") != work.data.image_size:
        wrong.append("image_size")
    if cfg.store_digest not in (None, identity.digest):
        wrong.append(f"digest ({identity.digest})")
    if wrong:
        raise PocketclipError(
            f"{folder} was made with another {' and '.join(wrong)} than this recipe: its vectors "
            "would belong to other pictures; reinforce again, or name the right store"
        )
    return store
