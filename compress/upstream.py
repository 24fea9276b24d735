"""Towers that stay as their own library builds them, behind the interface of ours.

The config names the builder and its arguments, so such a tower is rebuilt from model.json alone
and its weights are loaded strictly. Convolutional towers train with several branches that one
convolution can replace afterwards: `fold_` does, and files and timings are made of folded towers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compress.structure import UpstreamConfig


class UpstreamTower(nn.Module):
    """One tower: pixels or tokens to an embedding (not normalised)."""

    def __init__(self, config: UpstreamConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.tower = build(config, embed_dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """pixels [B, 3, H, W] or tokens [B, L] -> [B, E]; no patch can be left out."""
        assert keep is None, f"{self.config.name} has no patches to leave out"
        return self.tower(x)


def build(config: UpstreamConfig, embed_dim: int) -> nn.Module:
    """The module that a config describes, with random weights."""
    tower = _open_clip(embed_dim, **config.arguments)
    if config.folded:
        tower = folded(tower)
    return portable(tower)


def _open_clip(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False) -> nn.Module:
    """open_clip's image tower: timm's networks and ModifiedResNet."""
    from open_clip.model import _build_vision_tower

    settings = {**vision_cfg, "timm_model_pretrained": False, "output_tokens": False}
    return _build_vision_tower(embed_dim, settings, quick_gelu)


def folded(tower: nn.Module) -> nn.Module:
    """The tower with each group of training branches as one convolution; same function."""
    from timm.utils.model import reparameterize_model

    return reparameterize_model(tower, inplace=True)


def portable(tower: nn.Module) -> nn.Module:
    """The tower with attention written out, which every exporter understands."""
    for module in tower.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010
    return tower


def needs_folding(tower: UpstreamTower) -> bool:
    """Whether a tower still has branches that exist for training only."""
    ways = ("fuse", "reparameterize", "switch_to_deploy")
    return not tower.config.folded and any(
        hasattr(module, way) for module in tower.tower.modules() for way in ways
    )


def fill_buffers_(tower: UpstreamTower, embed_dim: int) -> None:
    """Fill buffers that no file holds (rotary tables, masks) after a build on the meta device."""
    empty = [name for name, buffer in tower.tower.named_buffers() if buffer.is_meta]
    if not empty:
        return
    with torch.device("cpu"):
        complete = build(tower.config, embed_dim)
    for name in empty:
        owner, _, leaf = name.rpartition(".")
        tower.tower.get_submodule(owner)._buffers[leaf] = complete.get_buffer(name)
