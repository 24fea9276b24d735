"""What both torchao peers share: towers of a Hugging Face CLIP as modules, compiled when opened."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOWERS = ("image", "text")


class Image(nn.Module):
    """pixels [B, 3, H, W] -> [B, E], unit length."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.model, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.model(pixel_values=pixels).pooler_output
        return nn.functional.normalize(self.projection(pooled), dim=-1)


class Text(nn.Module):
    """tokens [B, L] -> [B, E], unit length."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.model, self.projection = clip.text_model, clip.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = self.model(input_ids=tokens.long()).pooler_output
        return nn.functional.normalize(self.projection(pooled), dim=-1)


def save(model: Any, out: Path) -> None:
    """Write both towers of a quantized CLIPModel."""
    for tower, kind in zip(TOWERS, (Image, Text)):
        torch.save(kind(model).eval(), out / f"{tower}.pt")


class Encoder:
    """Both towers, compiled by Inductor as torchao's pages advise; the first call compiles."""

    def __init__(self, folder: Path) -> None:
        # These files were written by this machine a moment ago: pickles of nobody else's.
        found = (torch.load(folder / f"{tower}.pt", weights_only=False) for tower in TOWERS)
        self.image, self.text = (torch.compile(tower.eval()) for tower in found)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, E], a picture at a time, as the other peers' files."""
        return torch.cat([self.image(row[None]) for row in pixels])

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E]."""
        return torch.cat([self.text(row[None]) for row in tokens])


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> Encoder:
    """Open the folder; `device` is the CPU."""
    assert device == "cpu", "torchao's folders are measured on the CPU"
    if threads is not None:
        torch.set_num_threads(threads)
    return Encoder(folder)
