"""Cutting a transformer's tensors to a smaller shape: leading channels, whole heads.

Shapes: D width, H heads, K head width; lower-case letters are the smaller model's.
"""

import torch
from torch import Tensor


def leading(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The leading indices along each dimension. tensor of at least `shape` -> `shape`."""
    assert tensor.ndim == len(shape) and all(
        s <= t for s, t in zip(shape, tensor.shape, strict=True)
    ), (tuple(tensor.shape), shape)
    return tensor[tuple(slice(size) for size in shape)].clone()


def leading_heads(qkv: Tensor, head_width: int, heads: int, width: int | None) -> Tensor:
    """The first heads of a fused q, k, v projection, whole.

    Weight: qkv [3*H*K, D] with `width` d -> [3*h*K, d]. Bias: qkv [3*H*K], `width` None -> [3*h*K].
    """
    parts = qkv.view(3, -1, head_width, *qkv.shape[1:])[:, :heads]  # [3, h, K, (D)]
    parts = parts if width is None else parts[..., :width]
    return parts.reshape(3 * heads * head_width, *parts.shape[3:]).clone()


def uniform_layers(num_from: int, num_to: int) -> list[int]:
    """Layers to keep, evenly spread, the first and the last always among them (12 -> 3: 0, 6, 11).

    A single layer is the first one.
    """
    if num_to == 1:
        return [0]
    return [int(x + 0.5) for x in torch.linspace(0, num_from - 1, num_to).tolist()]


def front_layers(num_from: int, num_to: int) -> list[int]:
    """TinyCLIP's rule: every (num_from // num_to)-th layer from the first (12 -> 3: 0, 4, 8)."""
    step = num_from // num_to
    return [i * step for i in range(num_to)]


def whole_heads(fused: Tensor, parts: int, head_width: int, kept: list[int]) -> Tensor:
    """Only these heads of a tensor whose first dimension is parts x heads x head_width.

    [parts*H*K, ...] -> [parts*h*K, ...]; `parts` is 3 for a fused q, k, v projection, else 1.
    """
    by_head = fused.view(parts, -1, head_width, *fused.shape[1:])
    return by_head[:, kept].reshape(-1, *fused.shape[1:])


def cheapest_to_lose(scores: list[float], costs: list[float], saving: float) -> list[int]:
    """Indices with the least score for their cost whose costs add up to at least `saving`.

    All of them where they do not reach it.
    """
    order = sorted(range(len(scores)), key=lambda n: scores[n] / costs[n])
    chosen, saved = [], 0.0
    for n in order:
        if saved >= saving:
            break
        chosen.append(n)
        saved += costs[n]
    return chosen
