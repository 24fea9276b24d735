"""What an artifact costs in zero-shot accuracy, on a sample of the first evaluation split."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.clip import Clip, Encoder

NUM_IMAGES = 64
NUM_CLASSES = 200


def compare(clip: Clip, torch_model: Encoder, artifact: Encoder) -> dict[str, Any]:
    """`zero_shot`: top-1 of both on the same pictures and names, and its change.

    Empty without labelled evaluation data. A sample: the report has the whole split.
    """
    data = clip.data
    if data is None or not data.evaluate or data.classes_file is None:
        return {}
    pairs = data.split(next(iter(data.evaluate)))
    if not pairs.concepts:
        return {}
    chosen = np.linspace(0, len(pairs) - 1, min(NUM_IMAGES, len(pairs))).astype(int).tolist()
    concepts = [pairs.concepts[i] for i in chosen]
    names = _names(concepts, data.classes)
    tokens = clip.tokenizer([data.templates[0].format(name) for name in names.values()])
    pixels = torch.stack([clip.preprocess(pairs.image(i)) for i in chosen])
    right = torch.tensor([list(names).index(concept) for concept in concepts])
    before, after = (_top1(model, pixels, tokens, right) for model in (torch_model, artifact))
    return {
        "zero_shot": {
            "top1": after,
            "torch_top1": before,
            "delta": after - before,
            "num_images": len(chosen),
            "num_classes": len(names),
        }
    }


def _names(concepts: list[str], classes: list[tuple[str, str]]) -> dict[str, str]:
    """Concept -> name: those of the pictures, and others up to NUM_CLASSES."""
    wanted = set(concepts)
    others = [concept for concept, _ in classes if concept not in wanted]
    kept = wanted | set(others[: max(0, NUM_CLASSES - len(wanted))])
    return {concept: name for concept, name in classes if concept in kept}


def _top1(encoder: Encoder, pixels: Tensor, tokens: Tensor, right: Tensor) -> float:
    scores = encoder.encode_image(pixels) @ encoder.encode_text(tokens).T
    return (scores.argmax(dim=1) == right).float().mean().item()
