"""How well an encoder works: zero-shot accuracy, retrieval, and agreement with the teacher.

`measure` turns the arrays of `embeddings.py` into figures with 95 % bootstrap intervals; `evaluate`
does both steps for one split.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.embeddings import Config as Config
from compress.embeddings import Contracts, Embeddings, embed
from compress.scores import (
    Doubles,
    Integers,
    bootstrap_interval,
    overlap,
    relevant_ranks,
    top_items,
)

if TYPE_CHECKING:
    from compress.clip import Encoder
    from compress.work import Data


def measure(
    embeddings: Embeddings, cfg: Config, teacher: Embeddings | None = None
) -> dict[str, Any]:
    """Figures of one encoder on one split, fractions from 0 to 1, each with `NAME_ci95`.

    `top1`, `top5` (absent without classes), `image_to_text_r1/r5/r10`, `text_to_image_r1/r5/r10`
    and, with the teacher's embeddings of the same split, `teacher_top1_agreement`,
    `teacher_image_cosine` and `teacher_text_cosine` (absent where the widths differ) and
    `teacher_overlap10` (share of the ten nearest captions of an image that both find). Where widths
    agree, also what new queries find in the teacher's vectors: `index_text_to_image_r10`,
    `index_image_to_text_r10`, and `index_overlap10` (share of the ten pictures that stay).
    """
    split = embeddings.split
    row: dict[str, Any] = {
        "split": split.name,
        "num_images": len(split.indices),
        "num_captions": len(split.captions),
        "num_classes": len(split.class_names),
    }
    for samples in _samples(embeddings, teacher):
        columns = np.stack(list(samples.values()), axis=1).astype(np.float64)  # [N, K]
        low, high = bootstrap_interval(columns, cfg.resamples, cfg.seed)
        for n, name in enumerate(samples):
            row[name] = float(columns[:, n].mean())
            row[f"{name}_ci95"] = [float(low[n]), float(high[n])]
    return row


def _samples(own: Embeddings, teacher: Embeddings | None) -> list[dict[str, Doubles]]:
    """Per-query outcomes, one dict for each kind of query: labelled images, images, captions."""
    images = _hits("image_to_text", image_to_text_ranks(own))
    captions = _hits("text_to_image", text_to_image_ranks(own))
    labelled: dict[str, Doubles] = {}
    if len(own.classes):
        ranks = class_ranks(own)
        labelled = {"top1": (ranks < 1).astype(float), "top5": (ranks < 5).astype(float)}
    if teacher is not None:
        _same_questions(own, teacher)
        nearest = [top_items(e.images, e.captions, 10) for e in (own, teacher)]
        images["teacher_overlap10"] = overlap(*nearest)
        if own.images.shape == teacher.images.shape:
            images["teacher_image_cosine"] = (own.images * teacher.images).sum(axis=1)
            captions["teacher_text_cosine"] = (own.captions * teacher.captions).sum(axis=1)
            _on_old_index(images, captions, own, teacher)
        if len(own.classes):
            first = [top_items(e.images, e.classes, 1)[:, 0] for e in (own, teacher)]
            agree = (first[0] == first[1])[own.split.labels >= 0]
            labelled["teacher_top1_agreement"] = agree.astype(float)
    return [samples for samples in (labelled, images, captions) if samples]


def _on_old_index(
    images: dict[str, Doubles], captions: dict[str, Doubles], own: Embeddings, old: Embeddings
) -> None:
    """Add what searches give whose index holds the old model's vectors and whose query is new."""
    texts_on_old = replace(old, captions=own.captions)
    images_on_old = replace(old, images=own.images)
    captions["index_text_to_image_r10"] = (text_to_image_ranks(texts_on_old) < 10).astype(float)
    images["index_image_to_text_r10"] = (image_to_text_ranks(images_on_old) < 10).astype(float)
    nearest = [top_items(queries, old.images, 10) for queries in (own.captions, old.captions)]
    captions["index_overlap10"] = overlap(*nearest)


def _same_questions(own: Embeddings, teacher: Embeddings) -> None:
    same = own.split.captions == teacher.split.captions
    assert same and np.array_equal(own.split.indices, teacher.split.indices), own.split.name


def _hits(name: str, ranks: Integers) -> dict[str, Doubles]:
    return {f"{name}_r{k}": (ranks < k).astype(float) for k in (1, 5, 10)}


def class_ranks(embeddings: Embeddings) -> Integers:
    """Rank of the right class for each labelled image; classes of equal name are one class."""
    split = embeddings.split
    number = {name: n for n, name in enumerate(dict.fromkeys(split.class_names))}
    names = np.array([number[name] for name in split.class_names])  # [C]
    labelled = np.flatnonzero(split.labels >= 0)
    right = names[split.labels[labelled]]
    return relevant_ranks(
        embeddings.images[labelled],
        embeddings.classes,
        lambda block: right[block][:, None] == names[None],
    )


def image_to_text_ranks(embeddings: Embeddings) -> Integers:
    """Rank of the best right caption for each image: [N]."""
    split = embeddings.split
    return relevant_ranks(
        embeddings.images,
        embeddings.captions,
        lambda block: split.caption_groups[:, split.groups[block]].T,
    )


def text_to_image_ranks(embeddings: Embeddings) -> Integers:
    """Rank of the best right image for each caption: [M]."""
    split = embeddings.split
    return relevant_ranks(
        embeddings.captions,
        embeddings.images,
        lambda block: split.caption_groups[block][:, split.groups],
    )


def evaluate(
    encoder: "Encoder",
    clip: Contracts,
    data: "Data",
    split: str,
    cfg: Config | None = None,
    teacher: Embeddings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure one encoder on one split: `embed`, then `measure` (which see for the keys)."""
    cfg = cfg or Config()
    embeddings = embed(encoder, clip, data, cfg, [split], progress=progress)[split]
    return measure(embeddings, cfg, teacher)
