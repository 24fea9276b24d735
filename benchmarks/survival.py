"""Which parts of a picture still reach the embedding when tokens are merged or dropped.

Shapes: B pictures, P patches, K tokens left, R regions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from compress.clip import Clip
from compress.reduction import Reducer

REGION = 2
"""Patches along a side of a region: with 8-pixel patches a sixteenth of a 64-pixel picture."""


@torch.no_grad()
def surviving(clip: Clip, pixels: Tensor) -> Tensor:
    """Weight with which each patch is left in the tokens after the last site -> [B, P].

    1 for a patch that stays as it is, less where it is one of several in a mean, 0 if dropped.
    """
    matrices: list[Tensor] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(module, Reducer)
        matrices.append(module.matrix(*given))

    reducers = [m for m in clip.model.image.modules() if isinstance(m, Reducer)]
    hooks = [reducer.register_forward_pre_hook(note) for reducer in reducers]
    clip.model.encode_image(pixels)
    for hook in hooks:
        hook.remove()
    total = torch.eye(matrices[0].shape[-1]).expand(len(pixels), -1, -1)
    for matrix in matrices:
        total = matrix @ total  # [B, K, P]
    return total.sum(dim=1)


def lost_regions(weights: Tensor) -> Tensor:
    """Share of the regions that no token holds anything of: [B, P] -> [B]."""
    side = round(weights.shape[1] ** 0.5)
    whole = side // REGION * REGION
    grid = weights.unflatten(1, (side, side))[:, :whole, :whole]
    regions = grid.unflatten(2, (-1, REGION)).unflatten(1, (-1, REGION)).amax(dim=(2, 4))
    return (regions == 0).flatten(1).float().mean(dim=1)
