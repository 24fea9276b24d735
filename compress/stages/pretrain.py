"""Train a model from nothing (or further) with the contrastive loss and a bank of names.

Shapes: B pairs of the whole batch, b of this process, C names, E embedding.
"""

import copy
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from compress import losses, parallel
from compress.batches import NameBank, Sampler, embed_images, embed_texts
from compress.clip import Clip, build
from compress.data.augment import Augment, replay
from compress.model import Block, ClipModel
from compress.phases import Phase, check_phases, kept_patches, phase_at
from compress.precision import autocast
from compress.train import Training, bank_fits_checkpoints, fit, step_generator
from compress.work import Work

VERSION = 1


class Config(Training):
    """Settings of the pretrain stage, beside those of the training loop."""

    phases: tuple[Phase, ...] = ()
    """Resolutions over time; empty means the model's own from the start."""
    augment: Augment = Augment()
    """How strongly the images vary."""
    template_captions: bool = False
    """Whether each training pair also has its name in every template of `data.templates` as a
    caption: a text tower that never read its prompts ranks classes worse with them than without."""
    bank_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross entropy over the names of all training concepts; 0 costs nothing."""
    bank_every: int = Field(default=50, ge=1)
    """Steps between refreshes of the bank's text embeddings; divides checkpoint_every, so that a
    resumed run is exact."""
    bank_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing over the bank."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Largest rate of stochastic depth in the image tower, growing linearly with depth. Processes
    of a torchrun draw alike for their own images, so their number changes the draws."""
    max_scale: float = Field(default=100.0, gt=0)
    """Upper limit of the learnt logit scale."""

    @model_validator(mode="after")
    def _resume_is_exact(self) -> "Config":
        return bank_fits_checkpoints(self, self.bank_every)


def needs_captions(cfg: Config) -> str | None:
    """Why pictures alone will not do."""
    return "it learns from pairs: distill the image tower alone"


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Train a copy of `work.clip` on the training pairs; continues from a checkpoint in `out`."""
    if cfg.template_captions:
        work = replace(work, data=work.data.prompted())
    work = replace(work, device=parallel.local_device(work.device))
    clip = replace(work.clip, model=copy.deepcopy(work.clip.model).to(work.device))
    check_phases(cfg.phases, clip.model.config.vision, "pretrain")
    blocks = [block for block in clip.model.image.modules() if isinstance(block, Block)]
    for layer, block in enumerate(blocks):
        block.drop_path = cfg.drop_path * layer / max(1, len(blocks) - 1)
    train(clip, work, cfg, out)
    state = {n: parallel.whole(t).cpu() for n, t in clip.model.state_dict().items()}
    model = build(clip.model.config, state, "pretrain")
    return replace(
        work, clip=clip.with_model(model, {"step": "pretrain", "data": work.data.digest})
    )


def train(clip: Clip, work: Work, cfg: Config, out: Path) -> None:
    """Train `clip` in place."""
    sampler = Sampler(work.data.pairs)
    names = sampler.names if cfg.bank_weight else []
    bank = NameBank(clip, names, list(work.data.templates), cfg.bank_every)
    pretraining = Pretraining(clip.model, cfg)
    wrapped = parallel.wrap(pretraining, cfg.strategy)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = step_generator(work.seed, step)
        indices, groups = sampler.draw(cfg.batch_size, generator)
        pixels, keep = _pixels(work, cfg, indices, step, generator)
        captions = sampler.captions(indices, generator)[parallel.own_rows(len(indices))]
        tokens = clip.tokenizer(captions).to(work.device)
        batch = pixels, keep, tokens, bank.at(step), groups.to(work.device)
        loss, figures = wrapped(*batch, autocast(cfg.precision, work.device))
        return loss, figures

    fit(pretraining.student, step_loss, cfg, work.seed, out)


class Pretraining(nn.Module):
    """A model and its loss, one forward pass for DDP or FSDP2 to see."""

    def __init__(self, student: ClipModel, cfg: Config) -> None:
        super().__init__()
        self.student, self.cfg = student, cfg

    def forward(
        self,
        pixels: Tensor,
        keep: Tensor | None,
        tokens: Tensor,
        bank: Tensor,
        groups: Tensor,
        autocast: AbstractContextManager[Any],
    ) -> tuple[Tensor, dict[str, float]]:
        """pixels [b, 3, S, S] and tokens [b, L] of this process, bank [C, E], groups [B]: the rows
        of `bank` that name the images of the whole batch -> scalar loss, figures for the log.
        """
        student, cfg = self.student, self.cfg
        with autocast:
            u = embed_images(student.image, pixels, keep, cfg.micro_batch_size)
            v = embed_texts(student.text, tokens, cfg.micro_batch_size)
        u, v = parallel.gather(u), parallel.gather(v)
        scale = student.logit_scale.exp().clamp(max=cfg.max_scale)
        loss = contrastive = losses.clip_info_nce(u, v, scale)
        figures = {"contrastive": float(contrastive.detach()), "scale": float(scale.detach())}
        if cfg.bank_weight:
            extra = losses.bank_classification(u, bank, groups, scale, cfg.bank_smoothing)
            figures["bank_top1"] = float(((u @ bank.T).argmax(1) == groups).float().mean())
            loss = loss + cfg.bank_weight * extra
        return loss, figures


def _pixels(
    work: Work, cfg: Config, indices: Tensor, step: int, generator: Generator
) -> tuple[Tensor, Tensor | None]:
    """This process's augmented images and the patches to keep, for the phase this step is in."""
    vision = work.clip.model.config.vision
    phase = phase_at(cfg.phases, step / cfg.steps, vision)
    own = parallel.own_rows(len(indices))
    parameters = cfg.augment.draw(len(indices), generator)[own].to(work.device)
    images = work.data.pairs.images[indices[own]].to(work.device)
    pixels = replay(images, parameters, phase.image_size, work.clip.preprocess)
    keep = kept_patches(phase, len(indices), vision, generator)
    return pixels, None if keep is None else keep[own].to(work.device)
