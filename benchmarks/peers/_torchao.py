"""What both torchao peers share: towers of a Hugging Face CLIP as modules, compiled when opened."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


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


KINDS = {"image": Image, "text": Text}


def save(model: Any, out: Path) -> None:
    """Write the weights of both towers of a quantized CLIPModel, and its config."""
    model.config.save_pretrained(out)
    for tower, kind in KINDS.items():
        torch.save(kind(model).state_dict(), out / f"{tower}.pt")


class Encoder:
    """Both towers, compiled by Inductor as torchao's pages advise; the first call compiles."""

    def __init__(self, folder: Path) -> None:
        import torchao  # noqa: F401  its tensors are then known to torch.load
        from transformers import CLIPConfig, CLIPModel

        model = CLIPModel(CLIPConfig.from_pretrained(folder))
        towers = []
        for name, kind in KINDS.items():
            tower = kind(model).eval()
            state = torch.load(folder / f"{name}.pt", weights_only=True)
            tower.load_state_dict(state, assign=True)
            towers.append(torch.compile(tower))
        self.image, self.text = towers

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
