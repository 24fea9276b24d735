"""One training batch: which pairs, which captions, and cheap forward passes over them.

Shapes: B batch, L text tokens, S image side, E embedding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.clip import Clip
from compress.data.pairs import Pairs
from compress.errors import PocketclipError
from compress.model import TextTower
from compress.nn.widen import unit

IMAGE_CHUNK = 64  # images per forward pass: more spill the caches of a CPU core
TEXT_CHUNK = 128


@dataclass(frozen=True)
class Sampler:
    """Draws batches of different concepts; without concepts, of different pairs."""

    pairs: Pairs

    @cached_property
    def concepts(self) -> list[str]:
        """Concepts with at least one training image, sorted."""
        return sorted(set(self.pairs.concepts or ()))

    @cached_property
    def members(self) -> list[list[int]]:
        """Indices of the pairs of each concept."""
        if self.pairs.concepts is None:
            return [[index] for index in range(len(self.pairs.keys))]
        number = {concept: n for n, concept in enumerate(self.concepts)}
        members: list[list[int]] = [[] for _ in self.concepts]
        for index, concept in enumerate(self.pairs.concepts):
            members[number[concept]].append(index)
        return members

    @cached_property
    def names(self) -> list[str]:
        """The English name of each group, in the order of the group indices."""
        return [self.pairs.names[members[0]] for members in self.members]

    def draw(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Pairs of one step -> (pair indices [B], group indices [B]); no group twice."""
        if size > len(self.members):
            raise PocketclipError(
                f"batch_size {size} is more than the {len(self.members)} different concepts of the "
                "training data: lower it, as equal captions would count as negatives"
            )
        groups = torch.randperm(len(self.members), generator=generator)[:size]
        which = torch.rand(size, generator=generator)
        chosen = [self.members[g] for g in groups.tolist()]
        indices = [m[int(w * len(m))] for m, w in zip(chosen, which.tolist(), strict=True)]
        return torch.tensor(indices), groups

    def captions(self, indices: Tensor, generator: Generator) -> list[str]:
        """One random caption for each pair."""
        which = torch.rand(len(indices), generator=generator).tolist()
        captions = [self.pairs.captions[index] for index in indices.tolist()]
        return [c[int(w * len(c))] for c, w in zip(captions, which, strict=True)]


def embed_images(
    tower: nn.Module, pixels: Tensor, keep: Tensor | None = None, micro: int | None = None
) -> Tensor:
    """Unit embeddings in float32 or wider, computed in chunks. pixels [B, 3, S, S] -> [B, E].

    micro: images per chunk whose activations are not kept but computed again (`_recomputed`).
    """
    size, run = micro or IMAGE_CHUNK, _recomputed(tower) if micro else tower
    chunks = [
        run(pixels[i : i + size], keep=None if keep is None else keep[i : i + size])
        for i in range(0, len(pixels), size)
    ]
    return unit(torch.cat(chunks))


def embed_texts(tower: nn.Module, tokens: Tensor, micro: int | None = None) -> Tensor:
    """Unit embeddings in float32 or wider. tokens [B, L] -> [B, E]; `micro` as in `embed_images`.

    A causal tower that pools at the end of the text cannot see what follows it: texts are sorted by
    length and cut, which is exact and several times cheaper than full padding.
    """
    size, run = micro or TEXT_CHUNK, _recomputed(tower) if micro else tower
    if not isinstance(tower, TextTower) or not tower.config.sees_no_padding:
        parts = tokens.split(size) if micro else [tokens]
        return unit(torch.cat([run(part) for part in parts]))
    lengths = tokens.argmax(dim=-1) + 1
    order = lengths.argsort()
    chunks = [run(tokens[rows][:, : int(lengths[rows[-1]])]) for rows in order.split(size)]
    return unit(torch.cat(chunks))[order.argsort()]


def _recomputed(tower: nn.Module) -> Callable[..., Tensor]:
    """The tower without kept activations: GradCache's two passes (Gao et al., 2021).

    A contrastive loss needs only the embeddings of the whole batch, so each chunk's activations can
    be computed again when its turn comes in the backward pass, with the same random numbers.
    Batch norms move their running statistics in the second pass only.
    """

    def run(*inputs: Tensor, **named: Tensor | None) -> Tensor:
        called: Callable[..., Tensor] = tower
        found: Tensor = checkpoint(  # type: ignore[call-overload]
            called,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (_statistics_at_rest(tower), nullcontext()),
            **named,
        )
        return found

    return run


@contextmanager
def _statistics_at_rest(tower: nn.Module) -> Iterator[None]:
    norms = [m for m in tower.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracks in zip(norms, tracked, strict=True):
            norm.track_running_stats = tracks


@torch.no_grad()
def embed_names(clip: Clip, names: list[str], templates: list[str]) -> Tensor:
    """Mean unit embedding of each name over the templates, renormalised -> [C, E]."""
    device = clip.model.logit_scale.device
    total = torch.zeros((), device=device)
    for template in templates:
        tokens = clip.tokenizer([template.format(name) for name in names]).to(device)
        total = total + embed_texts(clip.model.text, tokens)
    return F.normalize(total, dim=-1)


class NameBank:
    """Text embeddings of all names, refreshed every few steps, one template after the other.

    They are a function of the weights at the last refresh, so checkpoints must fall on refreshes
    for a resumed run to be exact; the stages' settings check that.
    """

    def __init__(self, clip: Clip, names: list[str], templates: list[str], every: int) -> None:
        self.clip, self.names, self.templates, self.every = clip, names, templates, every
        self.embeddings: Tensor | None = None

    def at(self, step: int) -> Tensor:
        """The bank for this step -> [C, E] unit embeddings without gradient."""
        if not self.names:
            return torch.zeros(0)
        if self.embeddings is None or step % self.every == 0:
            template = self.templates[step // self.every % len(self.templates)]
            self.embeddings = embed_names(self.clip, self.names, [template])
        return self.embeddings
