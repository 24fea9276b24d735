"""The layers that ncnn has, in place of those of a tower.

Shapes: N tokens, L text tokens, D width, H heads, K head width, E embedding.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.clip import Clip
from compress.layers import Attention, AttentionPool
from compress.model import TextTower
from export import onnx as portable


def rewritten(clip: Clip, tower: str) -> nn.Module:
    """One tower, normalised, for a batch of 1, computing the same with ncnn's layers."""
    unit, split = portable.unit(clip, tower), _split()
    for parent in list(unit.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in split:
                setattr(parent, name, split[type(child)](child))
    module = unit.get_submodule("tower")
    if isinstance(module, TextTower) and _pools_at_end(module):
        # One token of the last block would need gather; all of them give the same embedding.
        module.config = config = module.config.model_copy(update={"last_block": "all"})
        end = clip.tokenizer.contract.end_id if config.pooling == "argmax" else config.end_id
        module.pooling = _EndPooling(config.vocab_size, config.context_length, end)
        # Shadows the method; a plain assignment would only register another child.
        object.__setattr__(module, "_pooled", module.pooling)
    return unit.eval()


class _SplitAttention(nn.Module):
    """Attention with a projection each for q, k and v."""

    def __init__(self, attention: Attention | SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.head_width = attention.heads, attention.head_width
        weights = attention.qkv.weight.detach().chunk(3)
        biases = attention.qkv.bias.detach().chunk(3)
        scales = (self.head_width**-0.5, 1.0, 1.0)
        parts = [_linear(w * s, b * s) for w, b, s in zip(weights, biases, scales)]
        self.query, self.key, self.value = parts
        # Token reduction and single-token blocks read the weights themselves.
        self.qkv, self.out = attention.qkv, attention.out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [1, N, D], mask [N, N] -> [1, N, D]."""
        tokens = x.shape[1]
        heads = (1, tokens, self.heads, self.head_width)
        q, k, v = (
            part(x).reshape(heads).transpose(1, 2) for part in (self.query, self.key, self.value)
        )  # each [1, H, N, K]
        scores = q @ k.transpose(2, 3)  # [1, H, N, N]
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(dim=-1) @ v  # [1, H, N, K]
        return self.out(mixed.transpose(1, 2).reshape(1, tokens, self.heads * self.head_width))


class _SplitPool(nn.Module):
    """Attention pooling with a projection each for k and v."""

    query: Tensor

    def __init__(self, pool: AttentionPool) -> None:
        super().__init__()
        self.pool, self.heads, self.head_width = pool, pool.heads, pool.head_width
        weights, biases = pool.kv.weight.detach().chunk(2), pool.kv.bias.detach().chunk(2)
        self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases))
        query = pool.query.detach() * self.head_width**-0.5
        self.register_buffer("query", query.view(1, self.heads, 1, self.head_width))

    def forward(self, x: Tensor) -> Tensor:
        """x [1, N, D] -> [1, pooled width]."""
        heads = (1, x.shape[1], self.heads, self.head_width)
        k, v = (part(x).reshape(heads).transpose(1, 2) for part in (self.key, self.value))
        weights = (self.query @ k.transpose(2, 3)).softmax(dim=-1)  # [1, H, 1, N]
        pooled = self.pool.out((weights @ v).reshape(1, self.heads * self.head_width))
        return pooled if self.pool.mlp is None else pooled + self.pool.mlp(self.pool.norm(pooled))


class _SplitMapAttention(nn.Module):
    """Attention of timm's fastvit, over a map of features, with a projection each for q, k, v."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        qkv = attention.qkv
        bias = torch.zeros(qkv.out_features) if qkv.bias is None else qkv.bias.detach()
        parts = SimpleNamespace(heads=attention.num_heads, head_width=attention.head_dim)
        parts.qkv, parts.out = _linear(qkv.weight.detach(), bias), attention.proj
        self.inside = _SplitAttention(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, D, rows, columns] -> the same shape."""
        _, width, rows, columns = x.shape
        mixed = self.inside(x.reshape(1, width, rows * columns).transpose(1, 2))  # [1, N, D]
        return mixed.transpose(1, 2).reshape(1, width, rows, columns)


def _split() -> dict[type[nn.Module], Any]:
    """Layer -> what stands for it."""
    from timm.models import fastvit

    own: dict[type[nn.Module], Any] = {Attention: _SplitAttention, AttentionPool: _SplitPool}
    return own | {fastvit.Attention: _SplitMapAttention}


class _EndPooling(nn.Module):
    """The token at the first end mark, found without comparing ids."""

    def __init__(self, vocab_size: int, length: int, end_id: int) -> None:
        super().__init__()
        marks = torch.zeros(vocab_size, 1)
        marks[end_id] = 1
        self.is_end = nn.Embedding.from_pretrained(marks)
        # Row i sums what stands before token i.
        self.before = _linear(torch.ones(length, length).tril(-1))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [1, L, D], tokens [1, L] -> [1, D]."""
        ends = self.is_end(tokens).transpose(1, 2)  # [1, 1, L], 1 at each end mark
        first = ends * F.relu(1 - self.before(ends))
        return (first @ x).reshape(1, x.shape[-1])


def _pools_at_end(tower: TextTower) -> bool:
    return tower.class_token is None and tower.config.pooling in ("argmax", "end")


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """weight [out, in] -> a layer that holds it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer
