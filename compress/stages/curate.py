"""Data reduction before training: keep the pairs that teach most.

score: the best-matching share by the teacher's image-caption similarity (DataComp's filter).
clusters: the best-matching pairs of each cluster of images (after TL;DR; our formulation, as its
codebook features and caption rewriting are another model's). balance: MetaCLIP's cap on how often a
concept's name occurs in captions. The kept samples are written unchanged to curated.tar, which the
following stages train on.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor

from compress import atomic
from compress.batches import embed_images, embed_texts
from compress.data.augment import plain
from compress.data.pairs import Pairs
from compress.data.shards import expand, read_members
from compress.errors import PocketclipError
from compress.nn.clusters import spherical_kmeans
from compress.work import Work

VERSION = 1
FILE = "curated.tar"
CHUNK = 256


class Config(BaseModel):
    """Settings of the curate stage; the rules apply in the order of the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: float | None = Field(default=None, gt=0, le=1)
    """Share of the pairs to keep by image-caption similarity; DataComp keeps 0.3."""
    clusters: int | None = Field(default=None, ge=1)
    """Number of image clusters; TL;DR has about 1000 of 3 million pairs."""
    per_cluster: float = Field(default=0.25, gt=0, le=1)
    """Share of each cluster to keep, at least one pair."""
    balance: int | None = Field(default=None, ge=1)
    """Pairs that a concept may have before more of its pairs are left out at random: MetaCLIP's t,
    20,000 at 400 million pairs."""
    caption: Literal["best", "first"] = "best"
    """Which caption of a pair is compared with its image."""

    @model_validator(mode="after")
    def _something_to_do(self) -> "Config":
        if self.score is None and self.clusters is None and self.balance is None:
            raise ValueError("score, clusters and balance are all unset: nothing to select by")
        return self


def needs_captions(cfg: Config) -> str | None:
    """Why pictures alone will not do."""
    return "it judges pictures by their captions"


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Choose pairs and write them to `out`; the model passes through unchanged."""
    pairs = work.data.pairs
    kept = select(work, cfg)
    before, after = len(pairs), len(kept)
    counts = {"num_pairs": before, "num_kept": after, "share": after / before}
    _write(work.data.train, {pairs.keys[index] for index in kept.tolist()}, out / FILE)
    atomic.write_json(out / "curated.json", {**counts, "settings": cfg.model_dump(mode="json")})
    step = {"step": "curate", "num_kept": after, "num_pairs": before}
    return replace(work, clip=work.clip.with_model(work.clip.model, step))


def select(work: Work, cfg: Config) -> Tensor:
    """Indices of the pairs to keep, ascending."""
    pairs = work.data.pairs
    generator = torch.Generator().manual_seed(work.seed)
    kept = torch.arange(len(pairs))
    if cfg.score is not None or cfg.clusters is not None:
        images, matches = embed(work, cfg.caption)
        if cfg.score is not None:
            kept = best_share(matches, cfg.score)
        if cfg.clusters is not None:
            clusters, _ = spherical_kmeans(images[kept], cfg.clusters, generator)
            kept = kept[best_of_each(clusters, matches[kept], cfg.per_cluster)]
    if cfg.balance is not None:
        chosen = [pairs.captions[index] for index in kept.tolist()]
        names = [name for _, name in work.data.classes]
        kept = kept[balanced(chosen, names, cfg.balance, generator)]
    if not len(kept):
        raise PocketclipError("curate: no pair is left; raise score, per_cluster or balance")
    return kept.sort().values


def best_share(matches: Tensor, share: float) -> Tensor:
    """Indices of the highest `share` of the scores [N]."""
    num = max(1, round(len(matches) * share))
    return matches.argsort(descending=True, stable=True)[:num]


def best_of_each(clusters: Tensor, matches: Tensor, share: float) -> Tensor:
    """Indices of the highest `share` of the scores in each cluster. clusters, matches [N]."""
    found = []
    for cluster in clusters.unique().tolist():
        members = (clusters == cluster).nonzero()[:, 0]
        found.append(members[best_share(matches[members], share)])
    return torch.cat(found)


def balanced(
    captions: Sequence[Sequence[str]], names: Sequence[str], limit: int, generator: Generator
) -> Tensor:
    """MetaCLIP's balancing: a pair whose captions contain a name stays with probability
    min(1, limit / count of that name), tried for each name; a pair without a name goes.
    """
    texts = [" ".join(f" {caption.lower()} " for caption in own) for own in captions]
    wanted = [f" {name.lower()} " for name in dict.fromkeys(names)]
    matches = [[name for name in wanted if name in text] for text in texts]
    counts = Counter(name for found in matches for name in found)
    kept = []
    for index, found in enumerate(matches):
        draws = torch.rand(len(found), generator=generator).tolist()
        if any(draw < limit / counts[name] for name, draw in zip(found, draws, strict=True)):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long)


@torch.no_grad()
def embed(work: Work, caption: str) -> tuple[Tensor, Tensor]:
    """The teacher's image embeddings [N, E] and each pair's similarity to its caption [N]."""
    teacher, pairs = work.teacher, work.data.pairs
    model = teacher.model.to(work.device)
    size = teacher.model.config.vision.image_size
    images, matches = [], []
    for start in range(0, len(pairs), CHUNK):
        rows = range(start, min(start + CHUNK, len(pairs)))
        pixels = plain(pairs.images[rows.start : rows.stop], size, teacher.preprocess)
        u = embed_images(model.image, pixels.to(work.device)).cpu()
        matches.append(_matches(work, pairs, rows, u, caption))
        images.append(u)
    return torch.cat(images), torch.cat(matches)


def _matches(work: Work, pairs: Pairs, rows: range, u: Tensor, caption: str) -> Tensor:
    own = [pairs.captions[row] if caption == "best" else pairs.captions[row][:1] for row in rows]
    texts = [text for captions in own for text in captions]
    owner = torch.tensor([n for n, captions in enumerate(own) for _ in captions])
    found = []
    for start in range(0, len(texts), CHUNK):
        tokens = work.teacher.tokenizer(texts[start : start + CHUNK]).to(work.device)
        found.append(embed_texts(work.teacher.model.text, tokens).cpu())
    similarity = (torch.cat(found) * u[owner]).sum(dim=1)
    return torch.full((len(u),), -2.0).scatter_reduce(0, owner, similarity, "amax")


def _write(sources: Sequence[Path], keys: set[str], path: Path) -> None:
    """Copy the members of the chosen samples, byte for byte."""
    with atomic.file(path) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for source in expand(sources):
            for key, members in groupby(read_members(source), attrgetter("key")):
                if key not in keys:
                    continue
                for member in members:
                    info = tarfile.TarInfo(f"{key}.{member.suffix}")
                    info.size = len(member.content)
                    tar.addfile(info, io.BytesIO(member.content))
