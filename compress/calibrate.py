"""Which training pairs a model is calibrated on, and what its layers see of them.

Shapes: N images, L text tokens, M sampled rows, D channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.batches import Sampler, embed_images, embed_texts
from compress.clip import Clip
from compress.model import ClipModel
from compress.work import Data

MOST_CAPTIONS = 8


@dataclass(frozen=True)
class Calibration:
    """Pairs of different concepts, ready for both towers."""

    pixels: Tensor
    """[N, 3, H, W]."""
    tokens: Tensor
    """[N, L], one caption of each image."""
    more_tokens: Tensor
    """[T, L], the images' other captions: ranges need more texts than there are pairs."""


def draw(clip: Clip, data: Data, num_images: int, seed: int) -> Calibration:
    """`num_images` training pairs (fewer where the data has fewer), a function of the seed."""
    sampler = Sampler(data.pairs)
    generator = torch.Generator().manual_seed(seed)
    indices, _ = sampler.draw(min(num_images, len(sampler.members)), generator)
    pixels = torch.stack([clip.preprocess(data.pairs.image(int(i))) for i in indices])
    chosen = sampler.captions(indices, generator)
    others = [c for i in indices.tolist() for c in data.pairs.captions[i][:MOST_CAPTIONS]]
    others = sorted(set(others) - set(chosen))
    more = clip.tokenizer(others) if others else clip.tokenizer(chosen)[:0]
    return Calibration(pixels, clip.tokenizer(chosen), more)


def embed(model: ClipModel, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Unit embeddings [N, E] of the images and of the texts."""
    return embed_images(model.image, calibration.pixels), embed_texts(
        model.text, calibration.tokens
    )


@torch.no_grad()
def collect(
    model: ClipModel, names: Sequence[str], calibration: Calibration, rows: int
) -> dict[str, Tensor]:
    """At most `rows` input rows [M, D] of each named layer that runs (a convolution's: patches)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    texts = torch.cat([calibration.tokens, calibration.more_tokens])
    counts = {"image": len(calibration.pixels), "text": len(texts)}
    generator = torch.Generator().manual_seed(0)

    def keep(name: str, module: nn.Module, x: Tensor) -> None:
        flat = _rows(module, x)
        share = rows / counts[name.split(".")[0]]
        num = min(len(flat), max(1, round(share * len(x))))
        # In the order of the samples, so that the first rows and the last are of different ones.
        kept = torch.randperm(len(flat), generator=generator)[:num].sort().values
        found[name].append(flat[kept].clone())

    with watching(model, names, keep):
        embed_images(model.image, calibration.pixels)
        embed_texts(model.text, texts)
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


@contextmanager
def watching(model: nn.Module, names: Sequence[str], see: Any) -> Iterator[None]:
    """Call see(name, module, input) whenever a named layer runs."""
    hooks = []
    for name in names:
        hook = lambda module, args, name=name: see(name, module, args[0])  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        assert isinstance(module.stride, tuple)
        x = F.unfold(x, module.kernel_size, stride=module.stride).transpose(1, 2)  # [N, P, D]
    return x.reshape(-1, x.shape[-1])
