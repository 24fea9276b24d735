"""Pictures with what two encoders call them, and how often which of the two is right."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from compress.data.pairs import Pairs
from compress.embeddings import Embeddings, Split
from compress.scores import Booleans, Integers, top_items

LARGEST = 96
"""Pixels a side of a picture in a report."""


def compare(
    teacher: Embeddings, student: Embeddings, pairs: Pairs, count: int, seed: int
) -> dict[str, Any]:
    """`counts` over all labelled pictures of a split, `pictures` for `count` drawn at random.

    `changed`: as many of the `num_changed` pictures that the two call by different names. Drawn
    without looking at the answers, so that the pictures are no better than the figures.
    """
    split = teacher.split
    labelled = np.flatnonzero(split.labels >= 0)
    best = {
        "teacher": top_items(teacher.images, teacher.classes, 3),
        "student": top_items(student.images, student.classes, 3),
    }
    right = {name: _right(teacher, top)[labelled] for name, top in best.items()}
    random = np.random.default_rng(seed)
    names = np.array(split.class_names)
    other = names[best["teacher"][labelled, 0]] != names[best["student"][labelled, 0]]

    def shown(candidates: Integers) -> list[dict[str, Any]]:
        chosen = random.choice(candidates, min(count, len(candidates)), replace=False)
        return [_picture(pairs, split, best, int(i)) for i in chosen]

    return {
        "counts": _counts(right["teacher"], right["student"]),
        "pictures": shown(labelled),
        "num_changed": int(other.sum()),
        "changed": shown(labelled[other]),
    }


def _picture(pairs: Pairs, split: Split, best: dict[str, Integers], i: int) -> dict[str, Any]:
    """One picture with its name and what each model calls it, best first."""
    names = {name: [split.class_names[c] for c in top[i]] for name, top in best.items()}
    png = _png(pairs.image(int(split.indices[i])))
    return {"png": png, "name": split.class_names[split.labels[i]], **names}


def _right(embeddings: Embeddings, top: Integers) -> Booleans:
    """Whether the first of each picture's classes [N, k] bears its name: [N]."""
    names = np.array(embeddings.split.class_names)
    right: Booleans = names[top[:, 0]] == names[embeddings.split.labels]
    return right


def _counts(teacher: Booleans, student: Booleans) -> dict[str, int]:
    return {
        "both": int((teacher & student).sum()),
        "teacher_only": int((teacher & ~student).sum()),
        "student_only": int((~teacher & student).sum()),
        "neither": int((~teacher & ~student).sum()),
    }


def _png(image: Image.Image) -> str:
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
