"""Our own CLIP: a vision transformer and a text transformer wholly described by a config.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head width, E embedding.
Plain-ViT models are converted into these towers on load (`sources/`), so that a pruned model of
irregular shape saves, loads and exports like any other; other towers stay as their library builds
them, behind the same interface (`upstream.py`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import PocketclipError
from compress.layers import (
    AttentionPool,
    Block,
    MixerBlock,
    norm,
    projection,
    resized_positions,
)
from compress.reduction import Abstraction, Reducer
from compress.scheme import apply_
from compress.structure import (
    ClipConfig,
    TextConfig,
    UpstreamText,
    UpstreamVision,
    VisionConfig,
)
from compress.upstream import UpstreamTower
from compress.upstream import fill_buffers_ as fill_upstream_buffers_

# Finite, so that half precision and integer graphs hold it; exp(-1e4) is exactly 0 in float32.
MASKED = -1e4


class ImageTower(nn.Module):
    """Pixels to an embedding (not normalised)."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.position = nn.Parameter(torch.zeros(config.num_tokens, width))
        self.norm_pre = norm(config.pre_norm, width, config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm_post = norm(config.norm_before_pooling, width, config)
        self.reducers = _reducers(config)
        queries = config.reduction.queries if config.reduction else 0
        self.abstraction = Abstraction(width, queries) if queries else None
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.norm_pooled = norm(config.norm_after_pooling, config.pooled_width, config)
        self.projection = projection(config, config.pooled_width, embed_dim)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed images.

        pixels [B, 3, H, W], normalised as the preprocess contract says -> [B, E], not unit length.
        Another H, W than the config's interpolates the position table (training at low resolution).
        keep [B, M]: indices of the patch tokens to keep (training with dropped patches).
        """
        x = self._patches(pixels)
        position = self._position(pixels.shape[-1] // self.config.patch_size)
        x = x + position[int(self.config.class_token) :]
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        if self.class_token is not None:
            first = (self.class_token + position[0]).to(x.dtype).expand(x.shape[0], 1, -1)
            x = torch.cat([first, x], dim=1)
        x = self.norm_pre(x)
        return self.projection(self.norm_pooled(self._pooled(*self._through_blocks(x))))

    def _patches(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> patch tokens [B, N, D]."""
        if self.config.patch_as == "conv":
            return self.patch(pixels).flatten(2).transpose(1, 2)
        side = self.config.patch_size
        batch, channels, height, width = pixels.shape
        x = pixels.reshape(batch, channels, height // side, side, width // side, side)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)
        return F.linear(x, self.patch.weight.flatten(1), self.patch.bias)

    def _through_blocks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, N, D] -> what the pooling reads: [B, N, D] or, of one token, [B, D]; and the number
        of patches in each token [B, N], None where none have merged."""
        sites = {r.layer: r for r in self.reducers if isinstance(r, Reducer)}
        size: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            mask = self._size_bias(size)
            if layer in sites:
                size = torch.ones_like(x[..., 0]) if size is None else size
                x, size = block.reduced(x, size, sites[layer], mask)
            elif layer == len(self.blocks) - 1 and self.config.last_block == "pooled":
                seen = x
                x = block.pooled(x, mask=None if mask is None else mask[:, 0, 0])
                return (x if self.abstraction is None else x + self.abstraction(seen)), size
            else:
                x = block(x, mask)
        if self.abstraction is not None:
            x = torch.cat([x[:, :1] + self.abstraction(x).unsqueeze(1), x[:, 1:]], dim=1)
        return x, size

    def _size_bias(self, size: Tensor | None) -> Tensor | None:
        """ToMe's proportional attention (3.3): sizes [B, N] -> [B, 1, 1, N], added to scores."""
        if size is None or not (self.config.reduction and self.config.reduction.proportional):
            return None
        return size.log()[:, None, None]

    def _pooled(self, x: Tensor, size: Tensor | None) -> Tensor:
        """x [B, N, D] or [B, D] -> [B, pooled width]; one token needs the norm of no other."""
        if self.pool is not None:
            return self.pool(self.norm_post(x))
        if self.config.pooling == "class":
            return self.norm_post(x if x.ndim == 2 else x[:, 0])
        patches = self.norm_post(x[:, int(self.config.class_token) :])
        if size is None:
            return patches.mean(dim=1)
        weight = size[:, int(self.config.class_token) :].unsqueeze(-1)  # a merged token is several
        return (patches * weight).sum(dim=1) / weight.sum(dim=1)

    def _position(self, grid: int) -> Tensor:
        if grid == self.config.grid:
            return self.position
        return resized_positions(self.position, int(self.config.class_token), grid)


def _reducers(config: VisionConfig) -> nn.ModuleList:
    reduction = config.reduction
    number = len(reduction.sites) if reduction else 0
    patches, first = config.grid**2, int(config.class_token)
    return nn.ModuleList(
        Reducer(reduction, n, config.width, patches, first) for n in range(number) if reduction
    )


def causal_mask(config: TextConfig) -> Tensor | None:
    """[L, L] with 0 where a token may look and MASKED above the diagonal; None if not causal."""
    length = config.num_tokens
    return torch.full((length, length), MASKED).triu(1) if config.causal else None


class TextTower(nn.Module):
    """Token ids to an embedding (not normalised)."""

    mask: Tensor | None

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.class_token = nn.Parameter(torch.zeros(config.width)) if config.class_token else None
        self.position = nn.Parameter(torch.zeros(config.num_tokens, config.width))
        self.norm_embedding = norm(config.embedding_norm, config.width, config)
        self.mixer_first, self.mixer_last = _mixer(config), _mixer(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm_final = norm(config.final_norm, config.width, config)
        self.projection = projection(config, config.width, embed_dim)
        self.register_buffer("mask", causal_mask(config), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] ids, L up to the context length -> [B, E], not unit length."""
        x = self.token(tokens)  # [B, L, D]
        if self.class_token is not None:
            x = torch.cat([x, self.class_token.expand(x.shape[0], 1, -1)], dim=1)
        x = self.norm_embedding(x + self.position[: x.shape[1]])
        mask = self._mask(tokens)
        x = self.mixer_first(x)
        last = len(self.blocks) - int(self.config.last_block == "pooled")
        for block in self.blocks[:last]:
            x = block(x, mask)
        if last < len(self.blocks):
            x = self._last_pooled(x, tokens)
            return self.projection(self.norm_final(x))
        x = self.norm_final(self.mixer_last(x))
        return self.projection(self._pooled(x, tokens))

    def _last_pooled(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The last block for the pooled token alone: x [B, N, D] -> [B, D]."""
        at = self._place(tokens)
        mask = None
        if self.config.causal:
            later = torch.gt(torch.arange(x.shape[1], device=x.device), at.unsqueeze(1))
            mask = later.to(x.dtype) * MASKED  # [B, N]
        block = self.blocks[-1]
        assert isinstance(block, Block)
        return block.pooled(x, at, mask)

    def _mask(self, tokens: Tensor) -> Tensor | None:
        """What is added to the scores: [N, N], [B, 1, 1, N] or [B, 1, N, N]; None for nothing."""
        causal = self.mask
        if causal is not None:
            length = tokens.shape[1] + int(self.config.class_token)
            causal = causal[:length, :length]
        if self.config.pad_id is None:
            return causal
        padding = torch.eq(tokens, self.config.pad_id)
        if self.class_token is not None:
            # CoCa's released weights were trained with this mask, shifted by one token.
            padding = torch.cat([padding.new_zeros(len(padding), 1), padding], dim=1)
        keys = (padding.to(self.position.dtype) * MASKED)[:, None, None]
        return keys if causal is None else keys + causal

    def _pooled(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [B, N, D] -> [B, D]."""
        pooling = self.config.pooling
        if pooling == "last" or self.class_token is not None:
            return x[:, -1]
        if pooling == "first":
            return x[:, 0]
        if pooling == "mean":
            assert self.config.pad_id is not None
            kept = tokens.ne(self.config.pad_id).to(x.dtype).unsqueeze(-1)  # [B, N, 1]
            return (x * kept).sum(dim=1) / kept.sum(dim=1)
        end = self._place(tokens)
        return x.gather(1, end.view(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)

    def _place(self, tokens: Tensor) -> Tensor:
        """Where the token stands that becomes the embedding: tokens [B, L] -> [B]."""
        if self.config.pooling == "end":
            tokens = (tokens == self.config.end_id).to(torch.int32)
        return tokens.argmax(dim=-1)


def _mixer(config: TextConfig) -> nn.Module:
    if not config.mixer_kernel:
        return nn.Identity()
    hidden = max(config.mlp_width)
    return MixerBlock(config.width, hidden, config.mixer_kernel, config.activation)


class ClipModel(nn.Module):
    """Both towers and the logit scale (kept as its logarithm)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.image: ImageTower | UpstreamTower
        self.text: TextTower | UpstreamTower
        if isinstance(config.vision, UpstreamVision):
            self.image = UpstreamTower(config.vision, config.embed_dim)
        else:
            self.image = ImageTower(config.vision, config.embed_dim)
        if isinstance(config.text, UpstreamText):
            self.text = UpstreamTower(config.text, config.embed_dim)
        else:
            self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.logit_bias else None
        if config.scheme is not None:
            apply_(self, config.scheme)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, E], not unit length."""
        return self.image(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E], not unit length."""
        return self.text(tokens)


def fill_buffers_(model: ClipModel) -> None:
    """Give a model built on the meta device the tensors that no file holds."""
    if isinstance(model.text, TextTower):
        model.text.mask = causal_mask(model.text.config)
    for tower in (model.image, model.text):
        if isinstance(tower, UpstreamTower):
            fill_upstream_buffers_(tower, model.config.embed_dim)


def num_embedding_params(model: ClipModel) -> int:
    """Weights of the token table, which is looked up only."""
    tables = (module for module in model.text.modules() if isinstance(module, nn.Embedding))
    return sum(table.weight.numel() for table in tables)


def plain_image_tower(model: ClipModel, place: str) -> ImageTower:
    """The image tower; PocketclipError unless it is ours. `place` is the stage that asks."""
    if isinstance(model.image, UpstreamTower):
        raise PocketclipError(f"{place} needs a ViT image tower; this is {model.image.config.name}")
    return model.image


def plain_text_tower(model: ClipModel, place: str) -> TextTower:
    """The text tower; PocketclipError unless it is ours."""
    if isinstance(model.text, UpstreamTower):
        name = model.text.config.name
        raise PocketclipError(f"{place} needs a transformer text tower; this is {name}")
    return model.text


def initialise_(model: ClipModel) -> None:
    """Random weights in place, from torch's global generator (CLIP's scheme).

    Towers of other libraries keep the weights that these drew when they built them.
    """
    if isinstance(model.image, ImageTower):
        _initialise_tower_(model.image, model.image.config.width**-0.5)
        for token in (model.image.class_token, getattr(model.image.pool, "query", None)):
            if token is not None:
                nn.init.normal_(token, std=model.image.config.width**-0.5)
    if isinstance(model.text, TextTower):
        _initialise_tower_(model.text, 0.01)
        nn.init.normal_(model.text.token.weight, std=0.02)
        if model.text.class_token is not None:
            nn.init.normal_(model.text.class_token, std=0.01)


def _initialise_tower_(tower: ImageTower | TextTower, position_std: float) -> None:
    depth = max(tower.config.num_layers, 1)
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in tower.blocks:
        assert isinstance(block, Block)
        for last in (block.attention.out, block.mlp.down):
            nn.init.normal_(last.weight, std=last.in_features**-0.5 * (2 * depth) ** -0.5)
    nn.init.normal_(tower.position, std=position_std)
