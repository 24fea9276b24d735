"""The layers of our towers, written out so that every exporter understands them.

Shapes: B batch, N tokens, D width, H heads, K head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import single_query
from compress.reduction import Reducer
from compress.structure import Activation, TowerConfig, VisionConfig


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v in one projection, written out for export."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.out = nn.Linear(heads * head_width, width)
        # Places for a quantization scheme to round what the two matrix products take.
        self.query, self.key, self.value = nn.Identity(), nn.Identity(), nn.Identity()
        self.probabilities = nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], mask [N, N] or [B, 1, 1 or N, N] added to the scores -> [B, N, D]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, K]
        scaled = self.query(q * self.head_width**-0.5)
        scores = scaled @ self.key(k).transpose(-2, -1)  # [B, H, N, N]
        if mask is not None:
            scores = scores + mask
        probabilities = self.probabilities(scores.softmax(dim=-1).to(v.dtype))
        mixed = probabilities @ self.value(v)  # [B, H, N, K]
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_width))


class Mlp(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activated(self.up(x), self.activation))


def activated(x: Tensor, activation: Activation) -> Tensor:
    """The activation of an MLP, element by element."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """Transformer block; `drop_path` skips a branch for whole samples in training."""

    def __init__(self, config: TowerConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attention = Attention(config.width, config.heads[layer], config.head_width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width[layer], config.activation)
        self.drop_path = 0.0
        self.post_norm = config.post_norm

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self._dropped(self.attention(x, mask)))
            return self.norm2(x + self._dropped(self.mlp(x)))
        x = x + self._dropped(self.attention(self.norm1(x), mask))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def reduced(
        self, x: Tensor, size: Tensor, reducer: Reducer, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The block with fewer tokens from its MLP on: x [B, N, D], size [B, N] -> both, shorter.

        `size` counts the patches in each token.
        """
        assert not self.post_norm
        normed = self.norm1(x)
        x = x + self._dropped(self.attention(normed, mask))
        x, size = reducer(x, normed, self.attention, size)
        return x + self._dropped(self.mlp(self.norm2(x))), size

    def pooled(self, x: Tensor, at: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The block's result for one token alone: x [B, N, D] -> [B, D].

        at [B]: its place, the first by default; mask [B, N], added to its scores.
        """
        assert not self.post_norm
        normed = self.norm1(x)
        token, normed_token = (_token(t, at) for t in (x, normed))
        branch = single_query.attend(self.attention, normed_token, normed, mask)
        token = token + self._dropped(branch.unsqueeze(1)).squeeze(1)
        return token + self._dropped(self.mlp(self.norm2(token)).unsqueeze(1)).squeeze(1)

    def _dropped(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


def _token(x: Tensor, at: Tensor | None) -> Tensor:
    """One token of each row: x [B, N, D], at [B] -> [B, D]; the first by default."""
    if at is None:
        return x[:, 0]
    return x.gather(1, at.view(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)


class MixerBlock(nn.Module):
    """MobileCLIP's convolutional text block (RepMixer, section 3.2), its branches folded.

    One convolution along the tokens of each channel mixes; another stands before the MLP.
    """

    def __init__(self, width: int, hidden: int, kernel: int, activation: Activation) -> None:
        super().__init__()
        along_tokens: dict[str, Any] = {
            "kernel_size": kernel,
            "padding": kernel // 2,
            "groups": width,
        }
        self.mix = nn.Conv1d(width, width, **along_tokens)
        self.conv = nn.Conv1d(width, width, **along_tokens)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]."""
        x = self.mix(x.transpose(1, 2))  # [B, D, L]
        branch = self.mlp(self.conv(x).transpose(1, 2))
        return x.transpose(1, 2) + branch


class AttentionPool(nn.Module):
    """What one learnt query reads from all tokens, then perhaps an MLP around a residual.

    The query is constant, so its projection is folded into it on load: query [H * K].
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.pool_heads, config.pool_head_width
        inner, width = self.heads * self.head_width, config.pooled_width
        self.query = nn.Parameter(torch.zeros(inner))
        self.kv = nn.Linear(config.width, 2 * inner)
        self.out = nn.Linear(inner, width)
        self.mlp = None
        if config.pool_mlp_width:
            self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.mlp = Mlp(width, config.pool_mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, pooled width]."""
        batch, tokens, _ = x.shape
        kv = self.kv(x).view(batch, tokens, 2, self.heads, self.head_width)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, K]
        query = self.query.view(self.heads, 1, self.head_width) * self.head_width**-0.5
        weights = (query @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype)  # [B, H, 1, N]
        pooled = self.out((weights @ v).reshape(batch, self.heads * self.head_width))
        return pooled if self.mlp is None else pooled + self.mlp(self.norm(pooled))


def projection(config: TowerConfig, width: int, embed_dim: int) -> nn.Module:
    """From the pooled width to the embedding, as `config.projection` says."""
    if config.projection == "none":
        return nn.Identity()
    if config.projection == "linear":
        return nn.Linear(width, embed_dim, bias=config.projection_bias)
    hidden = config.projection_width
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
    )


def norm(wanted: bool, width: int, config: TowerConfig) -> nn.Module:
    """A layer norm, or nothing."""
    return nn.LayerNorm(width, eps=config.layer_norm_eps) if wanted else nn.Identity()


def resized_positions(table: Tensor, first: int, grid: int) -> Tensor:
    """table [first + side^2, D] -> [first + grid^2, D]: the patches' embeddings for another grid.

    The `first` rows, of a class token, stay.
    """
    side = math.isqrt(len(table) - first)
    planes = table[first:].T.reshape(1, -1, side, side)
    planes = F.interpolate(planes, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([table[:first], planes.flatten(2)[0].T])
