"""Attention of one query a head to all tokens, without making the keys and values of all tokens.

(q W) x instead of q (W x): with N tokens of width D, H * N * D products in place of N * D * D. Used
where one token is all that matters: the last block of a tower that pools one token, and the class
token's view of the patches.

Shapes: B batch, N tokens, D width, H heads, C head width.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from compress.nn.fake import RoundedLinear

if TYPE_CHECKING:
    from compress.layers import Attention


def weight(attention: "Attention", part: int) -> Tensor:
    """Query, key or value weights (part 0, 1, 2) by head: [H, C, D]."""
    inner = attention.heads * attention.head_width
    whole = attention.qkv
    matrix = whole.rounded_weight() if isinstance(whole, RoundedLinear) else whole.weight
    rows = matrix[part * inner : (part + 1) * inner]
    return rows.reshape(attention.heads, attention.head_width, -1)


def bias(attention: "Attention", part: int) -> Tensor:
    """Query, key or value biases by head: [H, C]."""
    inner = attention.heads * attention.head_width
    rows = attention.qkv.bias[part * inner : (part + 1) * inner]
    return rows.reshape(attention.heads, attention.head_width)


def scores(attention: "Attention", token: Tensor, x: Tensor) -> Tensor:
    """What each head's query of one token [B, D] makes of all tokens [B, N, D] -> [B, H, N].

    The key bias adds the same to all scores of a query, which softmax ignores: it is left out.
    """
    flat = F.linear(token, weight(attention, 0).flatten(0, 1), bias(attention, 0).flatten())
    query = flat.unflatten(1, (attention.heads, 1, attention.head_width))  # [B, H, 1, C]
    lifted = (query * attention.head_width**-0.5) @ weight(attention, 1)  # [B, H, 1, D]
    return lifted.squeeze(2) @ x.transpose(1, 2)


def class_attention(attention: "Attention", x: Tensor) -> Tensor:
    """Attention of the first token to all, averaged over the heads: [B, N, D] -> [B, N]."""
    return scores(attention, x[:, 0], x).softmax(dim=-1).mean(dim=1)


def attend(attention: "Attention", token: Tensor, x: Tensor, added: Tensor | None) -> Tensor:
    """What the attention gives one token [B, D] that sees x [B, N, D] -> [B, D].

    added: [B, N] or [1, N], added to the scores.
    """
    found = scores(attention, token, x)  # [B, H, N]
    if added is not None:
        found = found + added.unsqueeze(1)
    mixed = (found.softmax(dim=-1).to(x.dtype) @ x).unsqueeze(2)  # [B, H, 1, D]
    values = (mixed @ weight(attention, 2).transpose(1, 2)).squeeze(2)  # [B, H, C]
    return attention.out((values + bias(attention, 2)).flatten(1))
