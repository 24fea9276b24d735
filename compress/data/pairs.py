"""All pairs of a data set decoded into memory, for sets that fit there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from compress.data.decode import fit_square
from compress.data.shards import BadSamples, count_samples, digest, read_samples
from compress.errors import PocketclipError

__all__ = ["Pairs", "digest", "load_pairs"]

# Fewer samples than this are read before a progress bar could be looked at.
NUM_SAMPLES_WITH_BAR = 2000


@dataclass
class Pairs:
    """Images with captions; position i of every list belongs to images[i]."""

    images: torch.Tensor
    """uint8 [N, 4, S, S]: RGBA, straight alpha."""
    captions: list[list[str]]
    """At least one per image, the plainest first."""
    concepts: list[str] | None
    """Ids of the classes, or None where the data has none."""
    names: list[str]
    styles: list[str]
    labels: list[dict[str, str]]
    """Language code -> the name in that language."""
    keys: list[str]
    skipped: list[str]
    """Messages of the damaged samples that were left out."""

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Image.Image:
        """Image `index` as RGBA."""
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


def load_pairs(
    paths: Sequence[Path | str],
    size: int,
    memory_limit_gib: float = 8,
    bad_samples: int = 0,
) -> Pairs:
    """Decodes all samples at `size` x `size` pixels: shortest side resized, centre cropped.

    Raises PocketclipError where the images would need more than `memory_limit_gib` (before any is
    decoded), and for damaged shards and samples, of which `bad_samples` may be left out.
    """
    num_samples = count_samples(paths)
    if num_samples == 0:
        raise PocketclipError(f"{', '.join(map(str, paths))}: no image with a caption in it")
    need_gib = num_samples * 4 * size * size / 2**30
    if need_gib > memory_limit_gib:
        raise PocketclipError(
            f"{num_samples} images of {size} x {size} pixels need {need_gib:.1f} GiB, over the "
            f"limit of {memory_limit_gib:g} GiB: use fewer shards, smaller images or a higher limit"
        )
    bad = BadSamples(bad_samples)
    pixels = np.empty((num_samples, size, size, 4), np.uint8)
    samples = []
    progress = track(
        read_samples(paths, bad),
        "reading images",
        total=num_samples,
        console=Console(stderr=True),
        transient=True,
        disable=num_samples < NUM_SAMPLES_WITH_BAR,
    )
    for index, sample in enumerate(progress):
        pixels[index] = np.asarray(fit_square(sample.image, size))
        samples.append(sample)
    concepts = [sample.concept for sample in samples]
    return Pairs(
        images=torch.from_numpy(pixels[: len(samples)]).permute(0, 3, 1, 2).contiguous(),
        captions=[sample.captions for sample in samples],
        concepts=concepts if all(concepts) else None,
        names=[sample.name for sample in samples],
        styles=[sample.style for sample in samples],
        labels=[sample.labels for sample in samples],
        keys=[sample.key for sample in samples],
        skipped=bad.skipped,
    )
