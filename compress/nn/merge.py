"""Fewer tokens: which to keep, which to merge into which, as one matrix of static shape.

Every method ends in a mixing matrix [B, K, P] that takes P tokens to K: a row with a single 1 keeps
a token, a row with several entries merges. It is built from TopK and Equal and applied by MatMul,
so that it exports to any runtime; nothing here is scattered, and no shape depends on the picture.

Shapes: B batch, P tokens before, K after, G guarded, C width of what similarity is measured on.
"""

import math

import torch
from torch import Tensor

from compress.nn.choose import (
    argmax,
    ascending,
    every,
    fixed,
    highest,
    identity,
    interleaved,
    looked_up,
    same,
    top,
    unit_length,
)

# Below any cosine or probability: what a token gets that must not be chosen.
NEVER = -4.0
# Width of the bell that spread_order uses, in places of the grid.
SPREAD = 1.5


def one_hot(indices: Tensor, num: int) -> Tensor:
    """indices [B, K] -> [B, K, num], 1 where the last place is the index."""
    return same(indices.unsqueeze(-1), torch.arange(num, device=indices.device))


def merging(kept: Tensor, goes_to: Tensor | None, num: int) -> Tensor:
    """Which token ends up where -> [B, K, P] of zeros and ones.

    kept [B, K]: tokens with a place of their own. goes_to [B, P]: the kept token that each of the
    other tokens joins (what it says of a kept token is ignored); None drops them.
    """
    own = one_hot(kept, num)  # [B, K, P]
    if goes_to is None:
        return own
    joins = same(kept.unsqueeze(-1), goes_to.unsqueeze(1))
    return own + joins * (1 - own.sum(dim=1, keepdim=True))


def weighted_mean(matrix: Tensor, weight: Tensor) -> Tensor:
    """Rows of `matrix` [B, K, P] as means with token weights [B, P], which are positive."""
    scaled = matrix * weight.unsqueeze(1)
    return scaled / scaled.sum(dim=-1, keepdim=True)


def bipartite(metric: Tensor, num_kept: int, first: int) -> Tensor:
    """ToMe's bipartite soft matching (Bolya et al. 2023, section 3) -> [B, K, P], zeros and ones.

    metric [B, P, C]: what similarity is measured on. Every second token, from `first` on, may merge
    into its most similar one of the others; the P - K most similar pairs do. With a class token
    before the patches, which ToMe keeps in the first set, `first` is 1, else 0.
    """
    num = metric.shape[1]
    num_sources = (num + 1 - first) // 2
    merged = num - num_kept
    assert 0 <= merged <= num_sources, (num, num_kept)
    unit = unit_length(metric)
    scores = every(unit, first, 2) @ every(unit, 1 - first, 2).transpose(1, 2)  # [B, A, T]
    best, nearest = highest(scores)  # [B, A]
    order = top(-best, num_sources)  # the least similar first
    stay = first + 2 * order[:, : num_sources - merged]
    targets = fixed(range(1 - first, num, 2), metric.device).expand(metric.shape[0], -1)
    kept = torch.cat([stay, targets], dim=1)
    return merging(kept, interleaved(1 - first + 2 * nearest, targets, first), num)


def complete(metric: Tensor, importance: Tensor, num_kept: int) -> Tensor:
    """CrossGET-like matching over all pairs (our formulation) -> [B, K, P], zeros and ones.

    The P - K tokens with the highest (largest cosine to any other, less their importance [B, P])
    each join the most similar token of those that remain, so that there are no chains.
    """
    num = metric.shape[1]
    unit = unit_length(metric)
    itself = identity(num, metric.device)
    cosines = unit @ unit.transpose(1, 2) + NEVER * itself  # [B, P, P]
    kept = top(importance - cosines.max(dim=-1).values, num_kept)
    leaves = 1 - one_hot(kept, num).sum(dim=1)  # [B, P]
    return merging(kept, argmax(cosines + NEVER * leaves.unsqueeze(1)), num)


def nearest_kept(metric: Tensor, kept: Tensor) -> Tensor:
    """Each token's most similar kept token, as an index among all. [B, P, C], [B, K] -> [B, P]."""
    unit = unit_length(metric)
    chosen = one_hot(kept, metric.shape[1])  # [B, K, P]
    cosines = unit @ (chosen @ unit).transpose(1, 2)  # [B, P, K]
    best = one_hot(argmax(cosines), kept.shape[1])  # [B, P, K]
    return looked_up(best, kept)


def fused(scores: Tensor, num_kept: int) -> Tensor:
    """EViT (Liang et al. 2022, section 3.2): K - 1 best tokens, one mean of the rest -> [B, K, P].

    The mean is weighted by `scores` [B, P] (positive) and normalised; the authors' code is not.
    """
    num = scores.shape[1]
    own = one_hot(top(scores, num_kept - 1), num)
    rest = (scores * (1 - own.sum(dim=1))).unsqueeze(1)  # [B, 1, P]
    return torch.cat([own, rest / rest.sum(dim=-1, keepdim=True)], dim=1)


def dominant_contextual(scores: Tensor, metric: Tensor, dominant: int, contextual: int) -> Tensor:
    """VisionZip (Yang et al. 2024, section 3.2) -> [B, dominant + contextual, P].

    The tokens of highest score [B, P] stay; among the others, in their order, evenly strided ones
    are targets, and each of the rest goes to the target of most similar key: its mean is added.
    """
    num = scores.shape[1]
    best = top(scores, dominant)
    others = ascending(top(-scores, num - dominant))  # [B, P - dominant]
    stride = max(1, (num - dominant) // contextual)
    targets = every(others.unsqueeze(-1), 0, stride).squeeze(-1)[:, :contextual]
    kept = torch.cat([best, targets], dim=1)
    own = one_hot(kept, num)
    free = (1 - own.sum(dim=1)).unsqueeze(1)  # [B, 1, P]
    joins = same(targets.unsqueeze(-1), nearest_kept(metric, targets).unsqueeze(1)) * free
    mean = joins / joins.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return torch.cat([own[:, :dominant], own[:, dominant:] + mean], dim=1)


def top_beside(scores: Tensor, guard: Tensor, num: int) -> Tensor:
    """Guarded tokens [G], then the best others: scores [B, P], below 3 -> indices [B, num]."""
    if not len(guard):  # runtimes differ in what an empty constant is
        return top(scores, num)
    barred = one_hot(guard.unsqueeze(0), scores.shape[1]).sum(dim=1)  # [1, P]
    rest = top(scores + NEVER * barred, num - len(guard))
    return torch.cat([guard.expand(scores.shape[0], -1).to(rest.dtype), rest], dim=1)


def best_rows(scores: Tensor, side: int, num_kept: int) -> Tensor:
    """FoPru's row strategy: whole rows of `side` tokens, those of highest sum -> [B, num_kept]."""
    rows = top(scores.unflatten(1, (-1, side)).sum(dim=-1), num_kept // side)  # [B, rows]
    columns = fixed(range(side), scores.device)
    return (rows.unsqueeze(-1) * side + columns).flatten(1)


def spread_order(side: int) -> list[int]:
    """All places of a side x side grid, each where those before it are felt least.

    Every place is felt as a bell of its distance (void and cluster, Ulichney 1993), mirrored at the
    borders, so that the first n are near-uniform for every n.
    """
    bell = [
        [
            sum(math.exp(-((a - image) ** 2) / (2 * SPREAD**2)) for image in _mirrored(b, side))
            for b in range(side)
        ]
        for a in range(side)
    ]
    points = [divmod(place, side) for place in range(side * side)]
    felt = [0.0] * len(points)
    order: list[int] = []
    while len(order) < len(points):
        free = (place for place in range(len(points)) if place not in order)
        row, column = points[chosen := min(free, key=lambda place: round(felt[place], 9))]
        order.append(chosen)
        for n, (r, c) in enumerate(points):
            felt[n] += bell[r][row] * bell[c][column]
    return order


def _mirrored(place: int, side: int) -> tuple[int, int, int]:
    return place, -1 - place, 2 * side - 1 - place
