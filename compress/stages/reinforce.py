"""Reinforce the training data (MobileCLIP): an ensemble of teachers embeds augmented images and
captions once, and students learn from the stored vectors, however many there are.

Each teacher sees pictures through its own preprocessing and texts through its own tokenizer. The
store, in the stage's folder, is described in `data/reinforced.py`; a stopped run goes on at the
first shard that is missing. The model passes through unchanged.
"""

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress import plugin
from compress.batches import Sampler, embed_images, embed_names, embed_texts
from compress.clip import Clip
from compress.data import name_bank, reinforced
from compress.data.augment import Augment, replay
from compress.data.captions import Captions, captions_of
from compress.data.param_aug import Crops
from compress.data.param_aug import replay as replay_crop
from compress.data.reinforced import Identity, Sample, Teacher
from compress.data.store import fingerprint
from compress.precision import autocast
from compress.preprocess import Preprocess, flatten
from compress.progress import tracked
from compress.work import Work

VERSION = 2
FOLDER = "store"
CHUNK = 256
"""Images or texts per forward pass."""


class Config(BaseModel):
    """Settings of the reinforce stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teachers: tuple[str, ...] = ()
    """Models that embed, as in `model:` but relative to the working directory; empty: the recipe's
    model."""
    views: int = Field(default=4, ge=1)
    """Stored augmentations of each image; 2 to 5 serve many epochs, DataCompDR has 10 or 30."""
    augment: Augment = Augment()
    """How strongly the images vary, for pictures in memory."""
    crops: Crops | None = None
    """Random resized crops and RandAugment in place of `augment`: for photos, DataCompDR's way."""
    captions: Captions = Captions()
    """Where synthetic captions come from."""
    template_captions: bool = False
    """Whether each pair also has its name in every template of `data.templates` as a caption; set
    it alike in the distill stage that reads the store."""
    shard_size: int = Field(default=1024, ge=1)
    """Samples of a shard; a stopped run loses one shard at most."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type of the teachers."""
    datacompdr: Literal["npz", "pth.gz"] | None = None
    """Also write the shards in Apple's layout, as float32 or bfloat16; needs `crops`."""
    workers: int = Field(default=0, ge=0)
    """Ray workers that share the shards (extra `distributed`); 0 works in this process."""


def needs_captions(cfg: Config) -> str | None:
    """Why pictures alone will not do."""
    return "it stores the captions' embeddings: distill with `teacher: stored`"


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Make the store in `out`, or what is missing of it."""
    data = work.data.prompted() if cfg.template_captions else work.data
    worker = Worker(replace(work, data=data), cfg, out / FOLDER)
    reinforced.begin(worker.folder, worker.identity)
    missing = [n for n in range(worker.identity.num_shards) if worker.find(n) is None]
    if cfg.workers:
        from compress.data.ray_shards import share

        share(worker, missing, cfg.workers)
    else:
        for number in tracked(missing, "teachers embed shards"):
            worker.make(number)
    worker.make_names()
    store = reinforced.open_store(worker.folder)
    if cfg.datacompdr:
        from compress.data.convert import to_datacompdr

        to_datacompdr(store, data.pairs, out / "datacompdr", cfg.datacompdr == "pth.gz")
    step = {"step": "reinforce", "store": store.identity.digest}
    return replace(work, clip=work.clip.with_model(work.clip.model, step))


@dataclass
class Worker:
    """Makes any shard of a store; a copy of it does so in another process."""

    work: Work
    cfg: Config
    folder: Path

    @cached_property
    def teachers(self) -> list[Clip]:
        """The ensemble, on the device of the recipe."""
        names = self.cfg.teachers
        found = [plugin.source(name, Path.cwd()) for name in names] or [self.work.teacher]
        for clip in found:
            clip.model.to(self.work.device)
        return found

    @cached_property
    def identity(self) -> Identity:
        """Of the store that this worker adds to."""
        cfg = self.cfg
        kind = "augment" if cfg.crops is None else "crops"
        settings = (cfg.crops or cfg.augment).model_dump(mode="json")
        return Identity(
            teachers=tuple(describe(clip) for clip in self.teachers),
            data=self.work.data.digest,
            transform={"kind": kind, **settings, "image_size": self.work.data.image_size},
            views=cfg.views,
            captions=cfg.captions.identity(),
            seed=self.work.seed,
            num_shards=-(-len(self.work.data.pairs) // cfg.shard_size),
        )

    def find(self, number: int) -> reinforced.Shard | None:
        """The shard, where it is finished."""
        return reinforced.read_shard(self.folder, number, self.identity.digest)

    @torch.no_grad()
    def make(self, number: int) -> None:
        """Embed one shard and write it."""
        pairs, cfg = self.work.data.pairs, self.cfg
        first = number * cfg.shard_size
        indices = torch.arange(first, min(first + cfg.shard_size, len(pairs)))
        start = (self.work.seed + 1) * 1_000_003 + number
        chosen, device = indices.tolist(), self.work.device
        synthetic = captions_of(cfg.captions, pairs, chosen, start, device)
        samples = [
            Sample(key=pairs.keys[i], captions=own, synthetic=more)
            for i, (own, more) in zip(chosen, synthetic, strict=True)
        ]
        tensors: dict[str, Tensor] = {}
        if cfg.crops is None:
            generator = torch.Generator().manual_seed(start)
            drawn = cfg.augment.draw(len(indices) * cfg.views, generator)
            tensors["parameters"] = drawn.view(len(indices), cfg.views, -1)
        else:
            chance = random.Random(start)
            side = pairs.images.shape[-1]
            crops = [
                [cfg.crops.draw(side, side, chance) for _ in range(cfg.views)] for _ in indices
            ]
            samples = [s.model_copy(update={"crops": c}) for s, c in zip(samples, crops)]
        for k, clip in enumerate(self.teachers):
            tensors[f"images.{k}"] = self._images(clip, indices, tensors, samples)
            tensors[f"texts.{k}"] = self._texts(clip, samples)
        reinforced.write_shard(self.folder, number, self.identity.digest, samples, tensors)

    @torch.no_grad()
    def make_names(self) -> None:
        """Embed the names of all concepts; without concepts there are none."""
        data = self.work.data
        if data.pairs.concepts is None or (self.folder / name_bank.FILE).exists():
            return
        names, templates = Sampler(data.pairs).names, list(data.templates)
        with autocast(self.cfg.precision, self.work.device):
            banks = [embed_names(clip, names, templates).float().cpu() for clip in self.teachers]
        name_bank.write(self.folder, self.identity.digest, names, banks)

    def _images(
        self, clip: Clip, indices: Tensor, tensors: dict[str, Tensor], samples: list[Sample]
    ) -> Tensor:
        """[n, V, E] bfloat16: each view through this teacher's size and normalisation."""
        views, found = self.cfg.views, []
        size = clip.preprocess.size[0]
        for start in range(0, len(indices) * views, CHUNK):
            which = torch.arange(start, min(start + CHUNK, len(indices) * views))
            rows = which // views
            if self.cfg.crops is None:
                images = self.work.data.pairs.images[indices[rows]].to(self.work.device)
                flat = tensors["parameters"].flatten(0, 1)[which].to(self.work.device)
                pixels = replay(images, flat, size, clip.preprocess)
            else:
                pixels = torch.stack(
                    [
                        self._crop(int(indices[row]), samples[row], int(n) % views, clip.preprocess)
                        for row, n in zip(rows.tolist(), which.tolist(), strict=True)
                    ]
                ).to(self.work.device)
            with autocast(self.cfg.precision, self.work.device):
                found.append(embed_images(clip.model.image, pixels).bfloat16().cpu())
        return torch.cat(found).view(len(indices), views, -1)

    def _crop(self, index: int, sample: Sample, view: int, preprocess: Preprocess) -> Tensor:
        assert sample.crops is not None
        picture = flatten(self.work.data.pairs.image(index), preprocess.background)
        size, mode = preprocess.size[0], preprocess.interpolation
        return preprocess(replay_crop(picture, sample.crops[view], size, mode))

    def _texts(self, clip: Clip, samples: list[Sample]) -> Tensor:
        """[t, E] bfloat16: captions and synthetic captions of each sample, one after the other."""
        texts = [text for sample in samples for text in (*sample.captions, *sample.synthetic)]
        found = []
        for start in range(0, len(texts), CHUNK):
            tokens = clip.tokenizer(texts[start : start + CHUNK]).to(self.work.device)
            with autocast(self.cfg.precision, self.work.device):
                found.append(embed_texts(clip.model.text, tokens).bfloat16().cpu())
        return torch.cat(found)


def describe(clip: Clip) -> Teacher:
    """A teacher's entry in a store's identity."""
    contract = clip.tokenizer.contract.model_dump_json()
    words = hashlib.sha256((clip.tokenizer.tokenizer.to_str() + contract).encode()).hexdigest()
    bias = clip.model.logit_bias
    return Teacher(
        name=clip.name,
        fingerprint=fingerprint(clip),
        tokenizer=words,
        embed_dim=clip.model.config.embed_dim,
        logit_scale=float(clip.model.logit_scale.detach().exp()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
    )
