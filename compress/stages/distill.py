"""Distillation: the student learns to relate images and texts as its teacher does.

The default is TinyCLIP's affinity mimicking with both scales fixed; every other loss of
`objective.py` can be added by its weight. `inherit` learns which weights to keep on the way.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress import parallel
from compress.batches import NameBank, embed_names
from compress.clip import Clip, build
from compress.data.augment import Augment
from compress.feed import Feed, open_feed
from compress.learner import Batch, Learner
from compress.masks import Inherit
from compress.model import plain_image_tower
from compress.objective import ALONE, FROM_PAIRS, FROM_TEACHER, NEED_BOTH_TOWERS, Objective
from compress.phases import Phase, check_phases
from compress.precision import autocast
from compress.removal import attended
from compress.stream_feed import Stream
from compress.train import Training, bank_fits_checkpoints, fit
from compress.work import Work

VERSION = 1


class Config(Training, Objective):
    """Settings of the distill stage, beside those of the training loop and the losses' weights."""

    bank_every: int = Field(default=50, ge=1)
    """Steps between refreshes of the student's bank; divides checkpoint_every."""
    scale: float | None = Field(default=50.0, gt=0)
    """Fixed logit scale of the student, TinyCLIP's 50; null learns it from the teacher's."""
    teacher_scale: Annotated[float, Field(gt=0)] | tuple[float, ...] | None = 50.0
    """Fixed logit scale of the teacher, or one for each; null takes the teachers' own."""
    teacher: Literal["online", "stored", "reinforced"] = "stored"
    """online: the teacher embeds each step's images. stored: it embeds `views` augmentations of
    each image once, before training; the student replays those augmentations. reinforced: the store
    that a reinforce stage has made, of several teachers and with synthetic captions."""
    store: Path | None = None
    """The reinforced store of another run; by default that of an earlier stage of this one."""
    store_digest: str | None = None
    """Refuse any other reinforced store than the one of this digest (`pocketclip store doctor`)."""
    stream: Stream | None = None
    """Read shards while training instead of decoding them into memory: large data sets, with the
    teacher online, or DataCompDR's reinforced shards."""
    towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    """The towers that learn. One left out keeps its weights and costs nothing: the teacher's
    embeddings stand for its own in every loss, so that the other learns towards a target that
    doesn't move. The student's embeddings must be as wide as those of its one teacher."""
    own_bank: bool = False
    """Where the text tower rests: whether `bank` ranks names by that tower's own embeddings of
    them, as the finished student will, rather than by the teacher's."""
    synthetic: Literal["sum", "mix", "none"] = "sum"
    """Synthetic captions of a reinforced store. sum: the losses with real and with synthetic
    captions are added (MobileCLIP). mix: either of them, at random. none: real captions only."""
    views: int = Field(default=4, ge=1)
    """Stored augmentations of each image."""
    augment: Augment = Augment()
    """How strongly the images vary, the same for teacher and student."""
    blend: float = Field(default=0.0, ge=0, le=1)
    """Share of the pictures that are blended with another one of the batch, by a uniform weight,
    for the student and its online teacher alike: more pictures to agree about than there are
    (function matching: Beyer et al., 2022). Without the losses that take a caption for a picture's
    right one."""
    template_captions: bool = False
    """Whether each training pair also has its name in every template of `data.templates` as a
    caption, so that the student reads the prompts it will be asked with."""
    phases: tuple[Phase, ...] = ()
    """The student's resolutions over time; the teacher always sees its own."""
    removal: Literal["attentive"] | None = None
    """attentive: the patches that a phase keeps are those that a moving average of the student
    attends to (A-CLIP); by default they are random."""
    languages: tuple[str, ...] = ()
    """Languages of the student's captions, drawn from the pairs' labels; the teacher sees its own.
    Empty: the captions as they are."""
    inherit: Inherit | None = None
    """Learn which weights the student keeps, and prune it to them on the way (TinyCLIP, automatic
    inheritance); null keeps the student's shape."""

    @model_validator(mode="after")
    def _resume_is_exact(self) -> "Config":
        return bank_fits_checkpoints(self, self.bank_every)

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Config":
        if not (self.needs_teacher or self.used(*ALONE)):
            raise ValueError("the weights of all losses are 0: nothing to learn from")
        return self

    @model_validator(mode="after")
    def _towers_can_learn_alone(self) -> "Config":
        if not self.towers:
            raise ValueError("towers: name at least one that learns")
        if len(set(self.towers)) == 2:
            if self.own_bank:
                raise ValueError("own_bank: the text tower learns too, so that its names are used")
            return self
        if self.own_bank and not ("image" in self.towers and self.used("bank")):
            raise ValueError("own_bank: no image tower learns by bank")
        of_images = () if "image" in self.towers else ("bank", "masked_feature")
        wrong = [name for name in (*NEED_BOTH_TOWERS, *of_images) if self.used(name)]
        wrong += ["inherit"] if self.inherit else []
        if wrong:
            raise ValueError(f"towers: {self.towers[0]} cannot learn by {wrong[0]} alone")
        if not self.needs_teacher:
            raise ValueError("towers: no loss asks the teacher, who would stand for the other one")
        return self

    @model_validator(mode="after")
    def _blends_have_targets(self) -> "Config":
        wrong = [name for name in FROM_PAIRS if self.used(name)]
        if self.blend and wrong:
            raise ValueError(f"blend: {wrong[0]} has no right caption for a blended picture")
        if self.blend and (self.teacher != "online" or self.stream):
            raise ValueError("blend needs `teacher: online`: no store holds blended pictures")
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Config":
        if self.micro_batch_size and self.used("matching", "masked_language"):
            raise ValueError("micro_batch_size: matching and masked_language need whole batches")
        if self.inherit and self.inherit.prune_step >= self.steps:
            given = f"inherit.prune_step ({self.inherit.prune_step})"
            raise ValueError(f"{given} must come before the last of {self.steps} steps")
        if self.used("bank") and self.stream and self.stream.teacher_widths:
            raise ValueError(
                "bank needs the teachers' embeddings of names, which shards in DataCompDR's layout "
                "don't hold: set bank to 0, or reinforce these pairs into a store of your own"
            )
        if self.stream and self.languages:
            raise ValueError("languages need pairs in memory, with labels")
        if self.inherit and self.strategy == "fsdp2":
            raise ValueError("inherit cannot prune weights that fsdp2 has sharded: use ddp")
        return self


OF_PICTURES = ("feature", "smooth_feature", "masked_feature", "bank")
OF_TEXTS = tuple(sorted({*FROM_TEACHER, *ALONE} - {*OF_PICTURES}))
"""Losses that pictures alone can feed (the bank with the names of `data.classes`), and all others.
"""


def needs_captions(cfg: Config) -> str | None:
    """Why pictures alone will not do, if they won't."""
    if "text" in cfg.towers:
        return "the text tower learns from captions: `towers: [image]`"
    if cfg.template_captions:
        return "template_captions puts names into prompts: leave it out"
    if cfg.teacher == "reinforced":
        return "a reinforced store is of pairs: `teacher: stored`"
    if other := next(filter(cfg.used, OF_TEXTS), None):
        return f"{other} compares pictures with captions: give it weight 0, and learn by feature"
    return None


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Train a copy of `work.clip` towards `work.teacher`; continues from a checkpoint in `out`."""
    if cfg.template_captions:
        work = replace(work, data=work.data.prompted())
    work = replace(work, device=parallel.local_device(work.device))
    student = replace(work.clip, model=copy.deepcopy(work.clip.model).to(work.device))
    if cfg.needs_teacher:
        work.teacher.model.to(work.device)
    check_phases(cfg.phases, student.model.config.vision, "distill")
    feed = open_feed(replace(work, clip=student), cfg, out)
    _start_scale(student, work.teacher, cfg)
    learner = Learner(student, cfg, feed.widths, work.teacher.model.config).to(work.device)
    train(learner, feed, work, cfg, out)
    state = {n: parallel.whole(t).cpu() for n, t in learner.student.state_dict().items()}
    work.teacher.model.cpu()
    step = {"step": "distill", "teacher": work.teacher.name, "data": work.data.digest}
    model = build(learner.student.config, state, "distill")
    return replace(work, clip=work.clip.with_model(model, step))


def train(learner: Learner, feed: Feed, work: Work, cfg: Config, out: Path) -> None:
    """Train what `learner` holds on the batches of `feed`."""
    banks = Banks(learner, feed, work, cfg)
    wrapped, shape = parallel.wrap(learner, cfg.strategy), learner.student

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        nonlocal wrapped, shape
        if learner.student is not shape:  # it has been pruned
            wrapped, shape = parallel.wrap(learner, cfg.strategy), learner.student
        if step:
            learner.move_average_()
        batch = replace(feed.at(step), bank=banks.at(step))
        if cfg.removal and batch.keep is not None:
            batch = _attentive(learner, batch)
        loss, figures = wrapped(batch, step, autocast(cfg.precision, work.device))
        return loss, figures

    fit(learner, step_loss, cfg, work.seed, out, learner if cfg.inherit else None)


class Banks:
    """The student's and the teachers' embeddings of all names, where `bank` counts."""

    def __init__(self, learner: Learner, feed: Feed, work: Work, cfg: Config) -> None:
        self.learner, self.used = learner, cfg.used("bank")
        self.teachers = feed.teacher_bank() if self.used else ()
        self.moves = self.used and "text" in cfg.towers
        templates = list(work.data.templates)
        names = feed.names if self.moves else []
        self.own = NameBank(learner.current, names, templates, cfg.bank_every)
        self.resting = self.teachers[0] if self.used else torch.empty(0)
        if cfg.own_bank:
            self.resting = embed_names(learner.current, feed.names, templates)

    def at(self, step: int) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The banks for this step: the student's and each teacher's [C, E]."""
        if not self.used:
            return None
        if not self.moves:
            return self.resting, self.teachers
        self.own.clip = self.learner.current
        return self.own.at(step), self.teachers


def _attentive(learner: Learner, batch: Batch) -> Batch:
    """The batch with the patches kept that the moving average attends to."""
    assert learner.momentum is not None and batch.keep is not None
    tower = plain_image_tower(learner.momentum, "distill.removal")
    return replace(batch, keep=attended(tower, batch.pixels, batch.keep.shape[1]))


def _start_scale(student: Clip, teacher: Clip, cfg: Config) -> None:
    """Fix the student's logit scale, or start it from the teacher's."""
    with torch.no_grad():
        if cfg.scale is not None:
            student.model.logit_scale.fill_(math.log(cfg.scale))
        else:
            student.model.logit_scale.copy_(teacher.model.logit_scale)
