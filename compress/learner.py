"""What trains during distillation: the student and all that learns or moves beside it.

One module, so that one state dict resumes all of it and DDP or FSDP2 see one forward pass.
Shapes: B pairs of the whole batch, b of this process, N image tokens, L text tokens, E embedding.
"""

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress import losses, parallel
from compress.batches import embed_images, embed_texts
from compress.clip import Clip, build
from compress.errors import PocketclipError
from compress.losses import TeacherFeatures
from compress.masks import Masks, attach_, pruned
from compress.model import ClipModel, plain_image_tower, plain_text_tower
from compress.objective import weight_at
from compress.optimizers import Cut
from compress.structure import ClipConfig
from compress.terms import Features, Parts, Terms, weighted_terms
from compress.token_losses import MaskedLanguage, text_hidden, unit_image_tokens, unit_text_tokens


@dataclass(frozen=True)
class Batch:
    """One step's input: this process's share of the pairs."""

    pixels: Tensor  # [b, 3, S, S]; [0] where the image tower doesn't learn
    keep: Tensor | None  # [b, M] patches the student sees
    tokens: Tensor  # [b, L]
    teachers: tuple[TeacherFeatures, ...] = ()
    """Their embeddings of the same images and captions."""
    masked_keep: Tensor | None = None  # [b, M], for masked_feature
    synthetic: Tensor | None = None  # [b, L], a second caption of each image
    synthetic_teachers: tuple[TeacherFeatures, ...] = ()
    bank: tuple[Tensor, tuple[Tensor, ...]] | None = None
    """The student's and each teacher's embeddings of all names."""


class Learner(nn.Module):
    """Student, helpers of losses, moving average and masks -> the loss of a batch.

    widths: the teachers' embedding widths. whole: the structure that a budget counts from.
    """

    def __init__(self, clip: Clip, cfg: Any, widths: tuple[int, ...], whole: ClipConfig) -> None:
        super().__init__()
        student = clip.model
        _check_tokens(student.config, cfg)
        _freeze_(student, cfg, widths)
        self.cfg, self.clip = cfg, clip
        self.student = student
        self.parts = Parts(cfg, student.config.embed_dim, widths)
        self.language = None
        if cfg.used("masked_language"):
            text = plain_text_tower(student, "distill.masked_language")
            self.language = MaskedLanguage(text, student.config.embed_dim)
        self.momentum: ClipModel | None = None
        if cfg.needs_momentum or cfg.removal:
            self.momentum = copy.deepcopy(student).requires_grad_(False)
        self.masks: Masks | None = None
        if cfg.inherit:
            if self.momentum is not None:
                raise PocketclipError("distill: inherit cannot be used with a moving average")
            self.masks = Masks(student.config, cfg.inherit, whole)
            attach_(student, self.masks)

    @property
    def current(self) -> Clip:
        """The student as it is now."""
        return replace(self.clip, model=self.student)

    def forward(
        self, batch: Batch, step: int, autocast: AbstractContextManager[Any]
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss of a batch and its terms for the log."""
        done = step / self.cfg.steps
        if self.masks is not None:
            self.masks.draw()
        f, synthetic = self._features(batch, done, autocast)
        terms = weighted_terms(self.cfg, f, self.parts, done)
        if synthetic is not None:
            for name, value in weighted_terms(self.cfg, synthetic, self.parts, done).items():
                terms[name] = terms[name] + value
        figures = {name: float(term.detach()) for name, term in terms.items()}
        if self.masks is not None:
            terms["budget"] = self.masks.loss(step)
            figures["sparsity"] = float(self.masks.sparsity().detach())
        return torch.stack(list(terms.values())).sum(), figures

    def _features(
        self, batch: Batch, done: float, autocast: AbstractContextManager[Any]
    ) -> tuple[Features, Features | None]:
        cfg, student = self.cfg, self.student
        extra: Terms = {}
        momentum = masked = second = None
        with autocast:
            if cfg.used("matching", "masked_language"):
                u, v, extra = self._token_level(batch, done)
            else:
                u, (v, second) = self._images(batch), self._texts(batch)
            if batch.masked_keep is not None and weight_at(cfg.masked_feature, done):
                masked = embed_images(
                    student.image, batch.pixels, batch.masked_keep, cfg.micro_batch_size
                )
            if cfg.needs_momentum:
                momentum = self._momentum(batch)
        u, v = parallel.gather(u), parallel.gather(v)
        scale = cfg.scale or student.logit_scale.exp().clamp(max=100.0)
        bias = student.logit_bias if student.logit_bias is not None else 0.0
        f = Features(
            u, v, scale, bias,
            teachers=_gathered(batch.teachers),
            momentum=momentum,
            masked_u=None if masked is None else parallel.gather(masked),
            bank=batch.bank,
            extra=extra,
        )  # fmt: skip
        if second is None:
            return f, None
        others = _gathered(batch.synthetic_teachers)
        again = replace(f, v=parallel.gather(second), teachers=others, extra={})
        return f, replace(again, momentum=None, bank=None)

    def _images(self, batch: Batch) -> Tensor:
        """The student's embeddings, or the teacher's where that tower doesn't learn."""
        if "image" not in self.cfg.towers:
            return batch.teachers[0].u
        micro = self.cfg.micro_batch_size
        return embed_images(self.student.image, batch.pixels, batch.keep, micro)

    def _texts(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Both sets of captions go through the text tower together; the teacher's embeddings where
        it doesn't learn.
        """
        if "text" not in self.cfg.towers:
            others = batch.synthetic_teachers
            return batch.teachers[0].v, others[0].v if others else None
        text, micro = self.student.text, self.cfg.micro_batch_size
        if batch.synthetic is None:
            return embed_texts(text, batch.tokens, micro), None
        both = embed_texts(text, torch.cat([batch.tokens, batch.synthetic]), micro)
        first, second = both.split(len(batch.tokens))
        return first, second

    def _token_level(self, batch: Batch, done: float) -> tuple[Tensor, Tensor, Terms]:
        """Embeddings and the losses on tokens, from the same forward passes."""
        student, cfg, extra = self.student, self.cfg, Terms()
        image = plain_image_tower(student, "distill: a loss on tokens")
        text = plain_text_tower(student, "distill: a loss on tokens")
        u, patches = unit_image_tokens(image, batch.pixels, batch.keep)
        v, words, real = unit_text_tokens(text, batch.tokens)
        if weight_at(cfg.matching, done):
            scale = cfg.scale or student.logit_scale.exp().clamp(max=100.0)
            gathered = [parallel.gather(x) for x in (patches, words, real.float())]
            extra["matching"] = losses.matching_loss(
                gathered[0], gathered[1], gathered[2] > 0, scale
            )
        if self.language is not None and weight_at(cfg.masked_language, done):
            masked_tokens, masked = self.language.hide(batch.tokens, real)
            with self.language.fused(text, u):
                hidden = text_hidden(text, masked_tokens)
            logits = self.language(hidden, text.token.weight)
            num = parallel.mean(masked.sum()) if parallel.size() > 1 else None
            extra["masked_language"] = losses.masked_language(logits, batch.tokens, masked, num)
        return u, v, extra

    @torch.no_grad()
    def _momentum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self.momentum is not None
        u = embed_images(self.momentum.image, batch.pixels)
        v = embed_texts(self.momentum.text, batch.tokens)
        return parallel.gather(u), parallel.gather(v)

    @torch.no_grad()
    def move_average_(self) -> None:
        """Move the momentum teacher towards the student; called before each step."""
        if self.momentum is None:
            return
        decay = self.cfg.momentum_decay
        pairs = zip(self.momentum.parameters(), self.student.parameters(), strict=True)
        for average, parameter in pairs:
            average.lerp_(parallel.whole(parameter.detach()), 1 - decay)

    @property
    def step(self) -> int:
        """When the masks become a smaller model (see `checkpoint.Surgery`)."""
        assert self.cfg.inherit is not None
        return int(self.cfg.inherit.prune_step)

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of the masks, while there are any."""
        return self.masks.groups() if self.masks is not None else []

    def operate(self) -> dict[str, Cut]:
        """Prune the student physically -> what is left of each parameter."""
        assert self.masks is not None
        self.masks.decide()
        device = self.student.logit_scale.device
        self.student, cuts = pruned(self.student, self.masks)
        self.student.to(device).train()
        self.masks = None
        return {f"student.{name}": kept for name, kept in cuts.items()}

    def structure(self) -> dict[str, Any]:
        """The pruned student's model.json entry."""
        return self.student.config.model_dump(mode="json")

    def restore(self, structure: dict[str, Any]) -> None:
        """A student of a pruned structure, whose weights follow from a checkpoint."""
        device = self.student.logit_scale.device
        config = ClipConfig.model_validate(structure)
        empty = {n: torch.zeros_like(t) for n, t in ClipModel(config).state_dict().items()}
        self.student = build(config, empty, "checkpoint").to(device).train()
        self.masks = None


def _check_tokens(config: ClipConfig, cfg: Any) -> None:
    """Refuse what reads all tokens of all blocks, where a tower doesn't have them."""
    words = cfg.used("matching", "masked_language")
    towers = {"image": config.vision} if words or cfg.removal else {}
    for side, tower in {**towers, **({"text": config.text} if words else {})}.items():
        if getattr(tower, "last_block", "all") == "pooled":
            raise PocketclipError(
                "distill: removal, matching and masked_language read all tokens of all blocks, "
                f"but the {side} tower's last block sees one: put the exact stage after distill"
            )
    if cfg.removal and getattr(config.vision, "reduction", None):
        raise PocketclipError(
            "distill.removal needs a tower that keeps its tokens: put prune_tokens after distill"
        )


def _freeze_(student: ClipModel, cfg: Any, widths: tuple[int, ...]) -> None:
    """Keep the tower as it is that doesn't learn; refuse teachers that cannot stand for it."""
    for side in {"image", "text"}.difference(cfg.towers):
        if widths != (student.config.embed_dim,):
            raise PocketclipError(
                f"distill.towers: embeddings of {' and '.join(map(str, widths))} entries cannot "
                f"stand for the {side} tower's of {student.config.embed_dim}: take one teacher of "
                "that width, or let both towers learn"
            )
        getattr(student, side).requires_grad_(False)


def _gathered(teachers: tuple[TeacherFeatures, ...]) -> tuple[TeacherFeatures, ...]:
    if parallel.size() == 1:
        return teachers
    return tuple(replace(t, u=parallel.gather(t.u), v=parallel.gather(t.v)) for t in teachers)
