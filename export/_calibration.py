"""Inputs from which the ranges of static integers are taken."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.clip import Clip
from export import _goldens


@dataclass(frozen=True)
class Calibration:
    """What both towers are run on; a run without training data has drawings instead."""

    image: Tensor
    """Pixels [B, 3, H, W]."""
    text: Tensor
    """Token ids int32 [B, L]: the captions, and texts of other lengths."""
    source: str
    """For the bundle: `training pairs`, `training pictures` or `drawings`."""

    def rows(self, tower: str) -> list[np.ndarray]:
        """One tower's inputs as a list of calls with one row each: [1, ...]."""
        return [row[None].numpy() for row in getattr(self, tower)]

    def record(self) -> dict[str, str | int]:
        """What bundle.json says of it."""
        return {"source": self.source, "num_images": len(self.image), "num_texts": len(self.text)}


def collect(clip: Clip, num: int) -> Calibration:
    """`num` training pairs spread evenly over the data, the first caption of each.

    Evaluation splits are never looked at. Ranges that come from drawings are wider apart from
    those of photographs: fine to see that a bundle works, poor for one that is shipped.
    """
    if clip.data is None or not clip.data.train:
        pictures = [_goldens.drawing(1000 + i, (96, 96 + i % 32)) for i in range(num)]
        texts, source = _goldens.captions()[:num], "drawings"
    else:
        pairs = clip.data.pairs
        chosen = np.linspace(0, len(pairs) - 1, min(num, len(pairs))).astype(int)
        pictures = [pairs.image(int(i)) for i in chosen]
        texts = [pairs.captions[i][0] for i in chosen]
        source = "training pairs" if clip.data.captions == "own" else "training pictures"
    pixels = torch.stack([clip.preprocess(picture) for picture in pictures])
    return Calibration(pixels, clip.tokenizer([*texts, *_goldens.TEXTS]), source)
