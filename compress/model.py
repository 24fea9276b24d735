"""Our own CLIP: a vision transformer and a text transformer wholly described by a config.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head width, E embedding.
Plain-ViT models are converted into these towers on load (`sources/`), so that a pruned model of
irregular shape saves, loads and exports like any other.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]

# Finite, so that half precision and integer graphs hold it; exp(-1e4) is exactly 0 in float32.
MASKED = -1e4


class TowerConfig(BaseModel):
    """What both towers share; one entry of `heads` and `mlp_width` per layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    """Residual stream width D."""
    head_width: int
    """Width K of each attention head."""
    heads: tuple[int, ...]
    """Number of attention heads, per layer; heads * head_width may differ from width."""
    mlp_width: tuple[int, ...]
    """Hidden width of the MLP, per layer."""
    activation: Activation = "gelu"
    """MLP activation; OpenAI's checkpoints use quick_gelu."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every layer norm."""

    @model_validator(mode="after")
    def _layers_agree(self) -> "TowerConfig":
        if len(self.heads) != len(self.mlp_width):
            raise ValueError(
                f"heads names {len(self.heads)} layers, mlp_width {len(self.mlp_width)}"
            )
        return self

    @property
    def num_layers(self) -> int:
        return len(self.heads)


class VisionConfig(TowerConfig):
    """The image tower: patches of `patch_size` pixels, a class token, a transformer."""

    image_size: int
    """Side of the square input in pixels."""
    patch_size: int
    """Side of a patch in pixels; divides image_size."""
    pooling: Literal["class", "mean"] = "class"
    """What becomes the embedding: the class token, or the mean over patch tokens."""
    class_token: bool = True
    """Whether a learnt class token stands before the patch tokens."""
    pre_norm: bool = True
    """Whether a layer norm stands before the first block."""
    patch_bias: bool = False
    """Whether the patch projection has a bias."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2 + int(self.class_token)


class TextConfig(TowerConfig):
    """The text tower: token and position embeddings, a transformer, one pooled token."""

    vocab_size: int
    """Rows of the token embedding."""
    context_length: int
    """Tokens of one text, padding included."""
    pooling: Literal["argmax", "last", "first"] = "argmax"
    """Which token becomes the embedding; argmax is the highest id, CLIP's end of text."""
    causal: bool = True
    """Whether a token sees only those before it."""


class ClipConfig(BaseModel):
    """Structure of a whole model, as written to model.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed_dim: int
    """Width E of the shared embedding space."""
    vision: VisionConfig
    """The image tower."""
    text: TextConfig
    """The text tower."""
    logit_bias: bool = False
    """Whether a learnt logit bias exists (SigLIP)."""


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v in one projection, written out for export."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.out = nn.Linear(heads * head_width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], mask [N, N] added to the scores -> [B, N, D]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, K]
        scores = (q * self.head_width**-0.5) @ k.transpose(-2, -1)  # [B, H, N, N]
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v  # [B, H, N, K]
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.head_width))


class Mlp(nn.Module):
    """Two linear layers around the activation."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.activation == "quick_gelu":
            return self.down(hidden * torch.sigmoid(1.702 * hidden))
        return self.down(
            F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        )


class Block(nn.Module):
    """Pre-norm transformer block; `drop_path` skips a branch for whole samples in training."""

    def __init__(self, config: TowerConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attention = Attention(config.width, config.heads[layer], config.head_width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width[layer], config.activation)
        self.drop_path = 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self._dropped(self.attention(self.norm1(x), mask))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class ImageTower(nn.Module):
    """Pixels to an embedding (not normalised)."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.position = nn.Parameter(torch.zeros(config.num_tokens, width))
        norm = lambda: nn.LayerNorm(width, eps=config.layer_norm_eps)  # noqa: E731
        self.norm_pre = norm() if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm_post = norm()
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed images.

        pixels [B, 3, H, W], normalised as the preprocess contract says -> [B, E], not unit length.
        Another H, W than the config's interpolates the position table (training at low resolution).
        keep [B, M]: indices of the patch tokens to keep (training with dropped patches).
        """
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # [B, N, D]
        position = self._position(pixels.shape[-1] // self.config.patch_size)
        x = x + position[int(self.config.class_token) :]
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if self.class_token is not None:
            first = (self.class_token + position[0]).to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat([first, x], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = x[:, 0] if self.config.pooling == "class" else x[:, int(self.config.class_token) :]
        x = self.norm_post(x)
        return self.projection(x if self.config.pooling == "class" else x.mean(dim=1))

    def _position(self, grid: int) -> Tensor:
        if grid == self.config.grid:
            return self.position
        first = int(self.config.class_token)
        side = self.config.grid
        table = self.position[first:].T.reshape(1, -1, side, side)
        table = F.interpolate(table, (grid, grid), mode="bicubic", antialias=True)
        return torch.cat([self.position[:first], table.flatten(2)[0].T])


def causal_mask(config: TextConfig) -> Tensor | None:
    """[L, L] with 0 where a token may look and MASKED above the diagonal; None if not causal."""
    length = config.context_length
    return torch.full((length, length), MASKED).triu(1) if config.causal else None


class TextTower(nn.Module):
    """Token ids to an embedding (not normalised)."""

    mask: Tensor | None

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)
        self.register_buffer("mask", causal_mask(config), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] ids, L up to the context length -> [B, E], not unit length."""
        length = tokens.shape[1]
        x = self.token(tokens) + self.position[:length]  # [B, L, D]
        mask = None if self.mask is None else self.mask[:length, :length]
        for block in self.blocks:
            x = block(x, mask)
        return self.projection(self._pooled(self.norm_final(x), tokens))

    def _pooled(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.config.pooling == "first":
            return x[:, 0]
        if self.config.pooling == "last":
            return x[:, -1]
        end = tokens.argmax(dim=-1)  # [B]
        return x.gather(1, end.view(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)


class ClipModel(nn.Module):
    """Both towers and the logit scale (kept as its logarithm)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config.vision, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.logit_bias else None

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, E], not unit length."""
        return self.image(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E], not unit length."""
        return self.text(tokens)


def initialise_(model: ClipModel) -> None:
    """Random weights in place, from torch's global generator (CLIP's scheme)."""
    for tower in (model.image, model.text):
        width, depth = tower.config.width, max(tower.config.num_layers, 1)
        for module in tower.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in tower.blocks:
            assert isinstance(block, Block)
            for last in (block.attention.out, block.mlp.down):
                nn.init.normal_(last.weight, std=last.in_features**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(tower.position, std=0.01 if tower is model.text else width**-0.5)
    if model.image.class_token is not None:
        nn.init.normal_(model.image.class_token, std=model.config.vision.width**-0.5)
    nn.init.normal_(model.text.token.weight, std=0.02)
