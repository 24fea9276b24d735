"""One step to fewer tokens, between attention and MLP of a block.

Scores are made from the class token's query alone, so that fused attention stays fused.

Shapes: B batch, N tokens, P of them patches, K kept, D width, H heads, C head width.
"""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import single_query
from compress.nn import choose, merge
from compress.schedule import Reduction

if TYPE_CHECKING:
    from compress.layers import Attention


class Reducer(nn.Module):
    """One site: P patch tokens to K."""

    def __init__(
        self, config: Reduction, number: int, width: int, num_patches: int, class_tokens: int
    ) -> None:
        """Site `number` of the schedule; `num_patches` are the picture's, before any site."""
        super().__init__()
        self.config, self.number, self.num_patches = config, number, num_patches
        self.class_tokens = class_tokens
        self.layer, self.keep = config.sites[number].layer, config.sites[number].keep
        self.offset: nn.Parameter | None = None
        self.score: nn.Sequential | None = None
        if config.method == "cross":
            self.offset = nn.Parameter(torch.zeros(width))
        if config.method == "selector":
            layers = (nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, 1))
            self.score = nn.Sequential(nn.LayerNorm(width), *layers)

    def forward(
        self, x: Tensor, normed: Tensor, attention: "Attention", size: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step: x [B, N, D], `normed` the input of the attention just before, size [B, N] the
        patches in each token -> x and size of the tokens that go on."""
        first = self.class_tokens
        patches = x[:, first:]
        keep = self._num_kept(patches.shape[1])
        if keep >= patches.shape[1]:
            return x, size
        mix, places = self._mixing(patches, x, normed, attention, size[:, first:], keep)
        kept = mix @ patches
        if self.score is not None:
            kept = kept * (1 + mix @ self._straight_through(patches))
        count = (places @ size[:, first:].unsqueeze(-1)).squeeze(-1)  # [B, K]
        return torch.cat([x[:, :first], kept], dim=1), torch.cat([size[:, :first], count], dim=1)

    def matrix(self, x: Tensor, normed: Tensor, attention: "Attention", size: Tensor) -> Tensor:
        """What becomes of each patch token [B, K, P]; for pictures of what survives."""
        first = self.class_tokens
        num = x.shape[1] - first
        keep = self._num_kept(num)
        if keep >= num:
            return torch.eye(num, device=x.device).expand(x.shape[0], -1, -1)
        return self._mixing(x[:, first:], x, normed, attention, size[:, first:], keep)[0]

    def _num_kept(self, num: int) -> int:
        """Training at another resolution keeps the same share."""
        before = self.num_patches if not self.number else self.config.sites[self.number - 1].keep
        return self.keep if num == before else max(2, round(self.keep * num / before))

    def _mixing(
        self,
        patches: Tensor,
        x: Tensor,
        normed: Tensor,
        attention: "Attention",
        size: Tensor,
        keep: int,
    ) -> tuple[Tensor, Tensor]:
        """The mixing matrix [B, K, P], and where patches are counted: [B, K, P]."""
        method, num = self.config.method, patches.shape[1]
        first = self.class_tokens
        if method in ("grid", "random"):
            kept = choose.fixed(self._places(num)[:keep], x.device).expand(x.shape[0], -1)
            return self._dropping(kept, num)
        if method == "tome":
            return _both(
                merge.bipartite(mean_keys(attention, normed)[:, first:], keep, first), size
            )
        if method == "fopru_rank":
            return self._dropping(choose.top(received(attention, normed)[:, first:], keep), num)
        if method == "fopru_row":
            rows = received(attention, normed)[:, first:]
            side = round(self.num_patches**0.5)
            return self._dropping(merge.best_rows(rows, side, keep), num)
        if method == "selector":
            mix = merge.fused(self._scores(patches), keep)
            return mix, choose.positive(mix)
        if method == "cross":
            assert self.offset is not None
            target = x[:, :1].detach() + self.offset  # [B, 1, D]
            importance = choose.cosine(patches, target)
            places = merge.complete(mean_keys(attention, normed)[:, first:], importance, keep)
            return merge.weighted_mean(places, size * importance.exp()), places
        return self._by_class_attention(normed, attention, size, keep)

    def _by_class_attention(
        self, normed: Tensor, attention: "Attention", size: Tensor, keep: int
    ) -> tuple[Tensor, Tensor]:
        method, num = self.config.method, size.shape[1]
        scores = single_query.class_attention(attention, normed)[:, 1:]  # [B, P]
        if method == "topk":
            return self._dropping(choose.top(scores, keep), num)
        if method == "evit":
            mix = merge.fused(scores, keep)
            return mix, choose.positive(mix)
        if method == "vision_zip":
            contextual = max(1, round(self.config.contextual * keep))
            keys = mean_keys(attention, normed)[:, 1:]
            mix = merge.dominant_contextual(scores, keys, keep - contextual, contextual)
            return mix, choose.positive(mix)
        if method == "feather" and not self._whole(num):
            return self._dropping(choose.top(scores, keep), num)
        guard = choose.fixed(self._guarded(num, keep), size.device)
        if method == "feather":
            return self._dropping(merge.top_beside(scores, guard, keep), num)
        kept = merge.top_beside(scores, guard, keep)
        goes_to = merge.nearest_kept(mean_keys(attention, normed)[:, 1:], kept)
        return _both(merge.merging(kept, goes_to, num), size)

    def _guarded(self, num: int, keep: int) -> Sequence[int]:
        """Places of the guarded tokens; once reduced they stand before the others."""
        guard = min(self.config.guard, keep - 1)
        return self._places(num)[:guard] if self._whole(num) else range(guard)

    def _places(self, num: int) -> list[int]:
        """The order in which grid and random keep places."""
        if self.config.method == "random":
            order = list(range(num))
            random.Random(f"{self.config.seed} {self.number}").shuffle(order)
            return order
        side = math.isqrt(int(num))  # while tracing, sizes are tensors
        # Once reduced, tokens already stand in the order of the grid.
        square = self._whole(num) and side * side == num
        return merge.spread_order(side) if square else list(range(num))

    def _whole(self, num: int) -> bool:
        """Whether no site before this one has taken or moved a token."""
        return self.number == 0 or num == self.num_patches

    def _scores(self, patches: Tensor) -> Tensor:
        assert self.score is not None
        return self.score(patches).squeeze(-1).sigmoid()  # [B, P]

    def _straight_through(self, patches: Tensor) -> Tensor:
        """Zero in value, the gradient of the scores: TopK itself has none. [B, P, 1]."""
        scores = self._scores(patches).unsqueeze(-1)
        return scores - scores.detach()

    @staticmethod
    def _dropping(kept: Tensor, num: int) -> tuple[Tensor, Tensor]:
        matrix = merge.merging(kept, None, num)
        return matrix, matrix


def _both(places: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Means weighted by size, as ToMe's, beside the zeros and ones they come from."""
    return merge.weighted_mean(places, size), places


def mean_keys(attention: "Attention", normed: Tensor) -> Tensor:
    """Keys averaged over the heads, what ToMe compares: [B, N, D] -> [B, N, C]."""
    # As a matrix of three dimensions it stays float in int8 graphs, where it decides what merges.
    weight = single_query.weight(attention, 1).mean(dim=0).T.unsqueeze(0)  # [1, D, C]
    return normed @ weight + single_query.bias(attention, 1).mean(dim=0)


def received(attention: "Attention", normed: Tensor) -> Tensor:
    """Attention that each token gets, averaged over heads and queries: [B, N, D] -> [B, N]."""
    shape = (attention.heads, attention.head_width)
    queries, keys = (
        F.linear(
            normed,
            single_query.weight(attention, part).flatten(0, 1),
            single_query.bias(attention, part).flatten(),
        )
        .unflatten(2, shape)
        .transpose(1, 2)
        for part in (0, 1)
    )  # [B, H, N, C]
    scores = (queries * attention.head_width**-0.5) @ keys.transpose(-2, -1)
    return scores.softmax(dim=-1).mean(dim=(1, 2))


class Abstraction(nn.Module):
    """A few learnt queries over the remaining tokens, added to the class token (BUS's PAD, ours).

    It starts as zero, so that a model that gets one says what it said before.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, D]."""
        normed = self.norm(x)
        scores = self.queries @ normed.transpose(1, 2) * x.shape[-1] ** -0.5  # [B, Q, N]
        return self.out((scores.softmax(dim=-1) @ self.value(normed)).mean(dim=1))
