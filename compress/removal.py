"""Which patches a student sees in training: the ones that a slower copy of it attends to (A-CLIP).

Left out of A-CLIP: its second masked view of each image with the SimCLR and BYOL terms between
views, the larger crop that the slower copy sees, choosing blocks of 2 x 2 patches in place of
single ones, the decay that grows to 1, and the frozen patch projection. Random patches, its
baseline, are what a phase keeps without this.

Shapes: B batch, N patches, T tokens (class token included), H heads, K head width.
"""

import torch
from torch import Tensor, nn

from compress.layers import Attention
from compress.model import ImageTower


@torch.no_grad()
def attention_scores(tower: ImageTower, pixels: Tensor) -> Tensor:
    """Attention that each patch gets from the class token (without one: from all tokens), averaged
    over heads and layers. pixels [B, 3, S, S] -> [B, N], rows below 1 in sum.
    """
    scores: list[Tensor] = []
    first = int(tower.config.class_token)

    def note(attention: nn.Module, qkv: Tensor) -> None:
        assert isinstance(attention, Attention)
        parts = qkv.unflatten(-1, (3, attention.heads, attention.head_width))
        q, k, _ = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, K]
        asking = q[:, :, :1] if first else q
        weights = (asking * attention.head_width**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        scores.append(weights.float().mean(dim=(1, 2))[:, first:])

    handles = [
        attention.qkv.register_forward_hook(
            lambda module, inputs, out, attention=attention: note(attention, out)
        )
        for attention in tower.modules()
        if isinstance(attention, Attention)
    ]
    try:
        tower(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(scores).mean(dim=0)


def attended(tower: ImageTower, pixels: Tensor, num: int) -> Tensor:
    """The `num` patches of each image that get most attention -> indices [B, num], ascending."""
    return attention_scores(tower, pixels).topk(num, dim=1).indices.sort(dim=1).values
