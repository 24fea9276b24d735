"""Pictures with what two encoders call them, and how often which of the two is right."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from compress.data.pairs import Pairs
from compress.embeddings import Embeddings
from compress.scores import Booleans, Integers, top_items


def compare(
    teacher: Embeddings, student: Embeddings, pairs: Pairs, count: int, seed: int
) -> dict[str, Any]:
    """`counts` over all labelled pictures of a split, `pictures` for `count` drawn at random.

    Drawn without looking at the answers, so that the pictures are no better than the figures.
    """
    split = teacher.split
    labelled = np.flatnonzero(split.labels >= 0)
    best = {
        "teacher": top_items(teacher.images, teacher.classes, 3),
        "student": top_items(student.images, student.classes, 3),
    }
    right = {name: _right(teacher, top)[labelled] for name, top in best.items()}
    chosen = np.random.default_rng(seed).choice(labelled, min(count, len(labelled)), replace=False)
    pictures = []
    for i in chosen:
        names = {name: [split.class_names[c] for c in top[i]] for name, top in best.items()}
        png = _png(pairs.image(int(split.indices[i])))
        pictures.append({"png": png, "name": split.class_names[split.labels[i]], **names})
    return {"counts": _counts(right["teacher"], right["student"]), "pictures": pictures}


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
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
