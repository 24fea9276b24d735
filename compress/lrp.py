"""Relevance of every rounded layer to the similarity of paired images and texts (LRP-QViT's idea).

The rules are published (`nn/relevance.py`, with the note on patents); how much a layer counts is
our formulation, as the paper's score is not public: the absolute relevance at its input, as a share
of its kind (qkv, up, ...), as kinds differ in scale.

Shapes: B pairs, N tokens, D width, H heads, K head width, E embedding.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibrate import Calibration
from compress.errors import PocketclipError
from compress.layers import Attention, Block, Mlp
from compress.model import (
    ClipModel,
    ImageTower,
    TextTower,
    plain_image_tower,
    plain_text_tower,
)
from compress.nn import relevance as rules

Scores = dict[str, float]
CHUNK = 32


@torch.no_grad()
def scores(model: ClipModel, calibration: Calibration) -> Scores:
    """Share of each layer, by name, within its kind; attention's sites are included.

    Raises PocketclipError for towers whose way from the last block to the embedding has no rule.
    """
    image, text = plain_image_tower(model, "lrp"), plain_text_tower(model, "lrp")
    found: Scores = defaultdict(float)
    for start in range(0, len(calibration.pixels), CHUNK):
        rows = slice(start, start + CHUNK)
        u = model.encode_image(calibration.pixels[rows])
        v = model.encode_text(calibration.tokens[rows])
        seeds = _seed(u, v), _seed(v, u)
        for name, value in tower_scores(image, calibration.pixels[rows], seeds[0]).items():
            found[f"image.{name}"] += value
        for name, value in tower_scores(text, calibration.tokens[rows], seeds[1]).items():
            found[f"text.{name}"] += value
    return _shares(found)


def _seed(u: Tensor, v: Tensor) -> Tensor:
    """Relevance 1 on each pair's similarity, over the entries of u [B, E]; norms are constants."""
    products = F.normalize(u, dim=-1) * F.normalize(v, dim=-1)
    return rules.divide(products, products.sum(-1, keepdim=True))


def _shares(found: Scores) -> Scores:
    totals: Scores = defaultdict(float)
    for name, value in found.items():
        totals[_kind(name)] += value
    return {name: value / max(totals[_kind(name)], rules.SMALL) for name, value in found.items()}


def _kind(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def tower_scores(tower: ImageTower | TextTower, inputs: Tensor, seed: Tensor) -> Scores:
    """Absolute relevance at the input of each layer of one tower, from seed [B, E] downwards."""
    if not isinstance(tower.projection, nn.Linear) or tower.config.pooling in ("attention", "end"):
        raise PocketclipError("lrp has no rule for this tower's pooling: take fisher or kl")
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in tower.blocks
    ]
    pooled: list[Tensor] = []
    hooks.append(tower.projection.register_forward_pre_hook(lambda _, args: pooled.append(args[0])))
    tower(inputs)
    for hook in hooks:
        hook.remove()
    found = {"projection": float(seed.abs().sum())}
    relevance = rules.linear(pooled[0], tower.projection.weight, seed)  # [B, D]
    relevance = _spread(tower, inputs, relevance, seen[0].shape[1])  # [B, N, D]
    mask = tower.mask if isinstance(tower, TextTower) else None
    for i in reversed(range(len(seen))):
        block = tower.blocks[i]
        assert isinstance(block, Block)
        part = None if mask is None else mask[: seen[i].shape[1], : seen[i].shape[1]]
        relevance, inner = block_relevance(block, seen[i], part, relevance)
        found |= {f"blocks.{i}.{name}": value for name, value in inner.items()}
    return found


def _spread(
    tower: ImageTower | TextTower, inputs: Tensor, relevance: Tensor, num_tokens: int
) -> Tensor:
    """Back from the pooled vector [B, D] to the tokens that it came from [B, N, D]."""
    spread = relevance.new_zeros(len(relevance), num_tokens, relevance.shape[1])
    pooling = tower.config.pooling
    if pooling == "mean":
        first = num_tokens - int(tower.config.num_tokens) + int(tower.config.class_token)
        spread[:, first:] = relevance.unsqueeze(1) / (num_tokens - first)
        return spread
    if pooling == "argmax":
        spread[torch.arange(len(inputs)), inputs.argmax(-1)] = relevance
    else:
        spread[:, -1 if pooling == "last" else 0] = relevance
    return spread


def block_relevance(
    block: Block, x: Tensor, mask: Tensor | None, relevance: Tensor
) -> tuple[Tensor, Scores]:
    """From a block's output to its input x [B, N, D]; norms and activations hand on unchanged."""
    first = block.norm1(x)
    attended = block.attention(first, mask)
    middle = x + attended
    second = block.norm2(middle)
    to_middle, to_mlp = rules.add(middle, block.mlp(second), relevance)
    from_mlp, found = _mlp(block.mlp, second, to_mlp)
    to_x, to_attention = rules.add(x, attended, to_middle + from_mlp)
    from_attention, inner = _attention(block.attention, first, mask, to_attention)
    return to_x + from_attention, found | inner


def _mlp(mlp: Mlp, x: Tensor, relevance: Tensor) -> tuple[Tensor, Scores]:
    seen: list[Tensor] = []
    hook = mlp.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mlp(x)
    hook.remove()
    hidden = rules.linear(seen[0], mlp.down.weight, relevance)
    below = rules.linear(x, mlp.up.weight, hidden)
    sums = {"mlp.down": float(hidden.abs().sum()), "mlp.up": float(below.abs().sum())}
    return below, sums


def _attention(
    attention: Attention, x: Tensor, mask: Tensor | None, relevance: Tensor
) -> tuple[Tensor, Scores]:
    batch, tokens, _ = x.shape
    split = attention.qkv(x).view(batch, tokens, 3, attention.heads, attention.head_width)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, K]
    scores = q @ k.transpose(-2, -1) * attention.head_width**-0.5
    mixing = (scores if mask is None else scores + mask).softmax(-1)
    mixed = (mixing @ v).transpose(1, 2).reshape(batch, tokens, -1)
    to_mixed = rules.linear(mixed, attention.out.weight, relevance)
    heads = to_mixed.view(batch, tokens, attention.heads, -1).transpose(1, 2)
    to_mixing, to_v = rules.product(mixing, v, heads)
    to_q, to_k = rules.product(q, k.transpose(-2, -1), to_mixing)
    together = torch.stack([to_q, to_k.transpose(-2, -1), to_v], dim=2)  # [B, H, 3, N, K]
    below = rules.linear(
        x, attention.qkv.weight, together.permute(0, 3, 2, 1, 4).reshape(batch, tokens, -1)
    )
    parts = {"out": to_mixed, "probabilities": to_mixing, "value": to_v, "query": to_q}
    parts |= {"key": to_k, "qkv": below}
    return below, {f"attention.{name}": float(part.abs().sum()) for name, part in parts.items()}
