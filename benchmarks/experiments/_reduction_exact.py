"""What the exact passes change, which is nothing, and what they save; for reduction.py."""

from typing import Any

import torch

from compress.clip import Clip
from compress.inspect import num_macs
from compress.sources import open_clip
from compress.stages.exact import pooled_last, restructured, trimmed, with_context
from compress.work import Data

FLOAT_BYTES = 4
EVERY = 20
"""One in so many of the vocabulary's texts is compared."""
CONTEXT = 16
"""Tokens that a text is cut to; texts that fit are compared."""


def measure(teacher: Clip, data: Data) -> list[dict[str, Any]]:
    """Rows of each pass, on the embedded teacher and on a ViT-B/32 with random weights."""
    names = [name for _, name in data.classes]
    large = open_clip.load("ViT-B-32/random")
    rows = []
    for clip, texts in ((teacher, names), (large, names)):
        for name, changed in {
            "last block": pooled_last(clip),
            "patches as a matrix": restructured(clip, vision={"patch_as": "matmul"}),
            f"context {CONTEXT}": with_context(clip, CONTEXT),
            "vocabulary": trimmed(clip, texts),
        }.items():
            read = [text for text in texts[::EVERY] if _length(clip, text) <= CONTEXT]
            rows.append(_row(clip, changed, name, read))
    return rows


def _length(clip: Clip, text: str) -> int:
    """Tokens of a text, its end included: the end has the highest id."""
    return int(clip.tokenizer([text]).argmax()) + 1


def _row(clip: Clip, changed: Clip, name: str, texts: list[str]) -> dict[str, Any]:
    size = clip.model.config.vision.image_size
    pixels = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    before, after = num_macs(clip.model.config), num_macs(changed.model.config)
    with torch.no_grad():
        moved = [
            changed.model.encode_image(pixels) - clip.model.encode_image(pixels),
            changed.model.encode_text(changed.tokenizer(texts))
            - clip.model.encode_text(clip.tokenizer(texts)),
        ]
    row: dict[str, Any] = {
        "part": "exact",
        "model": clip.name,
        "pass": name,
        "largest_change": max(float(m.abs().max()) for m in moved),
        "image_macs": round(after["image"] / before["image"], 4),
        "text_macs": round(after["text"] / before["text"], 4),
    }
    if name == "vocabulary":
        old, new = clip.model.config.text, changed.model.config.text
        sizes = [sum(p.numel() for p in c.model.parameters()) for c in (clip, changed)]
        width = clip.model.state_dict()["text.token.weight"].shape[1]
        row |= {
            "tokens": [old.vocab_size, new.vocab_size],
            "table_bytes": (old.vocab_size - new.vocab_size) * width * FLOAT_BYTES,
            "saved_bytes": (sizes[0] - sizes[1]) * FLOAT_BYTES,
        }
    return row
