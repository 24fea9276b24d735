"""All pairs of a data set decoded into memory, for sets that fit there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compress.data.decode import decode, fit_square
from compress.data.shards import BadSamples, Sample, count_samples, digest, read_samples
from compress.errors import PocketclipError
from compress.progress import tracked

__all__ = ["Pairs", "digest", "load_pairs", "load_split"]

# Fewer samples than this are read before a progress bar could be looked at.
NUM_SAMPLES_WITH_BAR = 2000


@dataclass
class Pairs:
    """Images with captions; position i of every list belongs to image i."""

    images: torch.Tensor
    """uint8 [N, 4, S, S]: RGBA, straight alpha. None of them where `files` has the images."""
    captions: list[list[str]]
    """At least one per image, the plainest first; none where pictures were read alone."""
    concepts: list[str] | None
    """Ids of the classes, or None where the data has none."""
    names: list[str]
    styles: list[str]
    labels: list[dict[str, str]]
    """Language code -> the name in that language."""
    keys: list[str]
    skipped: list[str]
    """Messages of the damaged samples that were left out."""
    files: list[bytes] = field(default_factory=list)
    """Encoded images, as they came, of a split that is measured; empty for training pairs."""

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, index: int) -> Image.Image:
        """Image `index` as RGBA; of a split's, at its own size and aspect."""
        if self.files:
            return decode(self.files[index])
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


def load_pairs(
    paths: Sequence[Path | str],
    size: int,
    memory_limit_gib: float = 8,
    bad_samples: int = 0,
    needs_caption: bool = True,
) -> Pairs:
    """Training pairs at `size` x `size` pixels: shortest side resized, centre cropped.

    needs_caption: without it a picture may come alone, with no captions in the list.
    Raises PocketclipError where the images would need more than `memory_limit_gib` (before any is
    decoded), and for damaged shards and samples, of which `bad_samples` may be left out.
    """
    num_samples = _count(paths, needs_caption)
    need_gib = num_samples * 4 * size * size / 2**30
    if need_gib > memory_limit_gib:
        raise PocketclipError(
            f"{num_samples} images of {size} x {size} pixels need {need_gib:.1f} GiB, over the "
            f"limit of {memory_limit_gib:g} GiB: use fewer shards, smaller images or a higher limit"
        )
    pixels = np.empty((num_samples, size, size, 4), np.uint8)

    def keep(index: int, sample: Sample) -> None:
        pixels[index] = np.asarray(fit_square(sample.image, size))

    pairs = _read(paths, num_samples, BadSamples(bad_samples), keep, needs_caption)
    pairs.images = torch.from_numpy(pixels[: len(pairs)]).permute(0, 3, 1, 2).contiguous()
    return pairs


def load_split(
    paths: Sequence[Path | str], memory_limit_gib: float = 8, bad_samples: int = 0
) -> Pairs:
    """Pairs to measure on, the images encoded as they came, so that each model's own preprocessing
    sees whole pictures.

    Raises PocketclipError where the files need more than `memory_limit_gib`, and for damaged shards
    and samples, of which `bad_samples` may be left out.
    """
    files: list[bytes] = []
    limit = memory_limit_gib * 2**30
    num_bytes = 0

    def keep(index: int, sample: Sample) -> None:
        nonlocal num_bytes
        num_bytes += len(sample.content)
        if num_bytes > limit:
            raise PocketclipError(
                f"{sample.key}: the images up to this one need more than the limit of "
                f"{memory_limit_gib:g} GiB: measure on fewer shards"
            )
        files.append(sample.content)

    pairs = _read(paths, _count(paths), BadSamples(bad_samples), keep)
    pairs.files = files
    return pairs


def _count(paths: Sequence[Path | str], needs_caption: bool = True) -> int:
    num_samples = count_samples(paths, needs_caption)
    if num_samples == 0:
        wanted = "no image with a caption" if needs_caption else "no image (.jpg, .png, .webp)"
        raise PocketclipError(f"{', '.join(map(str, paths))}: {wanted} in it")
    return num_samples


def _read(
    paths: Sequence[Path | str],
    total: int,
    bad: BadSamples,
    keep: Callable[[int, Sample], None],
    needs_caption: bool = True,
) -> Pairs:
    """All that belongs to the samples but the images, which `keep` is given one by one."""
    pairs = Pairs(torch.empty(0, 4, 0, 0, dtype=torch.uint8), [], [], [], [], [], [], bad.skipped)
    concepts = []
    samples = read_samples(paths, bad, needs_caption)
    bar = tracked(samples, "reading images", total, least=NUM_SAMPLES_WITH_BAR)
    for index, sample in enumerate(bar):
        keep(index, sample)
        concepts.append(sample.concept)
        pairs.captions.append(sample.captions)
        pairs.names.append(sample.name)
        pairs.styles.append(sample.style)
        pairs.labels.append(sample.labels)
        pairs.keys.append(sample.key)
    pairs.concepts = concepts if all(concepts) else None
    return pairs
