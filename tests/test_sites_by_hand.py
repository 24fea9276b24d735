"""A whole site against each method's definition, token by token in plain loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clip
from torch import Tensor

from compress.layers import Attention
from compress.model import ClipModel
from compress.nn import merge
from compress.reduction import Reducer, mean_keys, received
from compress.schedule import Reduction, Site
from compress.single_query import class_attention

SIDE, KEEP, GUARD = 4, 8, 3
NUM = SIDE * SIDE
Tokens = list[tuple[Tensor, float]]
"""What goes on: a vector, and the patches it counts for."""


class Given:
    """One picture at a site: what a method may look at, computed the plain way."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        image = ClipModel(tiny_clip().model.config).image
        attention = image.blocks[0].attention
        assert isinstance(attention, Attention)
        self.attention: Attention = attention
        torch.nn.init.normal_(self.attention.qkv.weight, std=0.3)
        self.width = self.attention.qkv.in_features
        self.x = torch.randn(1, NUM + 1, self.width)
        self.normed = torch.randn(1, NUM + 1, self.width)
        self.size = torch.randint(1, 4, (1, NUM + 1)).float()
        seen: list[Tensor] = []
        handle = self.attention.probabilities.register_forward_hook(lambda *a: seen.append(a[2]))
        self.attention(self.normed)
        handle.remove()
        self.probabilities = seen[0][0].detach()  # [H, N, N]
        heads = (3, self.attention.heads, self.attention.head_width)
        keys = self.attention.qkv(self.normed)[0].view(NUM + 1, *heads)[:, 1]
        self.keys = keys.mean(dim=1).detach()[1:]  # [P, C], of the patches
        self.by_class = self.probabilities[:, 0, 1:].mean(dim=0)
        self.by_all = self.probabilities.mean(dim=(0, 1))[1:]

    def token(self, patch: int) -> Tensor:
        return self.x[0, patch + 1]

    def count(self, patch: int) -> float:
        return float(self.size[0, patch + 1])

    def alike(self, a: int, b: int) -> float:
        return float(F.cosine_similarity(self.keys[a], self.keys[b], dim=0))

    def mean(self, patches: list[int], weights: list[float]) -> tuple[Tensor, float]:
        """A weighted mean of tokens, and all patches in them."""
        total = sum(
            (w * self.token(p) for p, w in zip(patches, weights, strict=True)), 0 * self.x[0, 0]
        )
        return total / sum(weights), sum(self.count(p) for p in patches)

    def joined(self, kept: list[int], weight: Callable[[int], float]) -> Tokens:
        """Every other token joins the kept one whose key is most similar."""
        groups = {k: [k] for k in kept}
        for patch in set(range(NUM)) - set(kept):
            groups[max(kept, key=lambda k: self.alike(patch, k))].append(patch)
        return [self.mean(group, [weight(p) for p in group]) for group in groups.values()]


def best(scores: Any, num: int, among: list[int] | None = None) -> list[int]:
    return sorted(among or range(NUM), key=lambda p: -float(scores[p]))[:num]


def tome(g: Given, _: Reducer) -> Tokens:
    """Tokens with the class token in place 0 alternate between A and B; the most similar pairs of A
    to B merge."""
    a, b = list(range(1, NUM, 2)), list(range(0, NUM, 2))
    partner = {p: max(b, key=lambda q: g.alike(p, q)) for p in a}
    merged = sorted(a, key=lambda p: -g.alike(p, partner[p]))[: NUM - KEEP]
    groups = {q: [q, *(p for p in merged if partner[p] == q)] for q in b}
    alone = [(g.token(p), g.count(p)) for p in a if p not in merged]
    return alone + [g.mean(group, [g.count(p) for p in group]) for group in groups.values()]


def evit(g: Given, _: Reducer) -> Tokens:
    return _fused(g, g.by_class)


def selector(g: Given, reducer: Reducer) -> Tokens:
    assert reducer.score is not None
    return _fused(g, reducer.score(g.x[0, 1:]).sigmoid().flatten())


def _fused(g: Given, scores: Tensor) -> Tokens:
    kept = best(scores, KEEP - 1)
    rest = [p for p in range(NUM) if p not in kept]
    return [*_stay(g, kept), g.mean(rest, [float(scores[p]) for p in rest])]


def _stay(g: Given, kept: list[int]) -> Tokens:
    return [(g.token(p), g.count(p)) for p in kept]


def topk(g: Given, _: Reducer) -> Tokens:
    return _stay(g, best(g.by_class, KEEP))


def fopru_rank(g: Given, _: Reducer) -> Tokens:
    return _stay(g, best(g.by_all, KEEP))


def fopru_row(g: Given, _: Reducer) -> Tokens:
    rows = [range(SIDE * r, SIDE * (r + 1)) for r in range(SIDE)]
    rows.sort(key=lambda row: -sum(float(g.by_all[p]) for p in row))
    return _stay(g, [p for row in rows[: KEEP // SIDE] for p in row])


def _guarded(g: Given) -> list[int]:
    grid = merge.spread_order(SIDE)[:GUARD]
    others = [p for p in range(NUM) if p not in grid]
    return grid + best(g.by_class, KEEP - GUARD, others)


def guarded(g: Given, _: Reducer) -> Tokens:
    return g.joined(_guarded(g), g.count)


def feather(g: Given, _: Reducer) -> Tokens:
    return _stay(g, _guarded(g))


def vision_zip(g: Given, _: Reducer) -> Tokens:
    dominant = best(g.by_class, KEEP - 1)
    others = [p for p in range(NUM) if p not in dominant]
    target = others[0]
    gathered = [p for p in others if p != target]
    mean = sum((g.token(p) for p in gathered), torch.zeros(g.width)) / len(gathered)
    return [*_stay(g, dominant), (g.token(target) + mean, sum(g.count(p) for p in others))]


def cross(g: Given, reducer: Reducer) -> Tokens:
    assert reducer.offset is not None
    learnt = g.x[0, 0] + reducer.offset
    importance = [float(F.cosine_similarity(g.token(p), learnt, dim=0)) for p in range(NUM)]
    nearest = [max(g.alike(p, q) for q in range(NUM) if q != p) for p in range(NUM)]
    kept = best([i - n for i, n in zip(importance, nearest, strict=True)], KEEP)
    weight = [g.count(p) * float(torch.tensor(importance[p]).exp()) for p in range(NUM)]
    return g.joined(kept, lambda p: weight[p])


def in_order(tokens: Tensor, counts: Tensor) -> Tensor:
    """Rows [K, D + 1] by their first entry: a transformer doesn't see the order."""
    rows = torch.cat([tokens, counts.unsqueeze(1)], dim=1)
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize(
    "definition",
    [tome, evit, selector, topk, fopru_rank, fopru_row, guarded, feather, vision_zip, cross],
)
@torch.no_grad()
def test_a_site_is_what_its_definition_says(
    definition: Callable[[Given, Reducer], Tokens],
) -> None:
    g = Given()
    guard = GUARD if definition in (guarded, feather) else 0
    # A share of the kept tokens that leaves one contextual token.
    config = Reduction(
        method=definition.__name__, sites=(Site(layer=0, keep=KEEP),), guard=guard, contextual=0.1
    )
    reducer = Reducer(config, 0, g.width, NUM, 1)
    if reducer.offset is not None:
        reducer.offset.normal_()
    x, size = reducer(g.x, g.normed, g.attention, g.size)
    wanted = definition(g, reducer)
    expected = in_order(
        torch.stack([token for token, _ in wanted]), torch.tensor([count for _, count in wanted])
    )
    assert x.shape == (1, KEEP + 1, g.width)
    torch.testing.assert_close(in_order(x[0, 1:], size[0, 1:]), expected, rtol=0, atol=1e-5)
    assert torch.equal(x[0, 0], g.x[0, 0])


@torch.no_grad()
def test_what_methods_look_at_is_what_attention_computes() -> None:
    g = Given()
    close: dict[str, float] = {"rtol": 0, "atol": 1e-6}
    mean = g.probabilities.mean(dim=0)
    torch.testing.assert_close(class_attention(g.attention, g.normed)[0], mean[0], **close)
    torch.testing.assert_close(received(g.attention, g.normed)[0], mean.mean(dim=0), **close)
    keys = mean_keys(g.attention, g.normed)[0, 1:]
    torch.testing.assert_close(keys, g.keys, rtol=0, atol=1e-5)
