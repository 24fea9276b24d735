"""Token merging against slow loops over the papers' definitions."""

import math

import pytest
import torch
from torch import Tensor

from compress.nn import choose, merge

# float32, sums of at most 50 terms: the papers' definitions in another order of additions.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
P, K, D = 20, 14, 12


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def tome(x: Tensor, metric: Tensor, size: Tensor, num_kept: int, first: int) -> Tensor:
    """ToMe's appendix D as loops and a scatter: unmerged sources, then targets. One picture."""
    sources, targets = list(range(first, len(x), 2)), list(range(1 - first, len(x), 2))
    pairs = []
    for a in sources:
        score, b = max((cosine(metric[a], metric[b]), b) for b in targets)
        pairs.append((score, a, b))
    pairs.sort(reverse=True)
    merged = pairs[: len(x) - num_kept]
    total, count = x * size[:, None], size.clone()
    index = torch.tensor([b for _, _, b in merged])
    rows = torch.tensor([a for _, a, _ in merged])
    total = total.scatter_add(0, index[:, None].expand(-1, x.shape[1]), total[rows])
    count = count.scatter_add(0, index, count[rows])
    stay = [a for _, a, _ in reversed(pairs[len(merged) :])]
    return (total / count[:, None])[torch.tensor(stay + targets)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("num", [20, 21])
def test_bipartite_matching_is_tomes_with_a_scatter(first: int, num: int) -> None:
    x, metric = torch.randn(3, num, D), torch.randn(3, num, 8)
    size = torch.randint(1, 4, (3, num)).float()
    matrix = merge.bipartite(metric, K, first)
    found = merge.weighted_mean(matrix, size) @ x
    for b in range(3):
        torch.testing.assert_close(found[b], tome(x[b], metric[b], size[b], K, first), **CLOSE)


def test_no_patch_is_lost_and_none_counted_twice() -> None:
    matrix = merge.bipartite(torch.randn(2, P, 8), K, 1)
    assert torch.equal(matrix.sum(dim=1), torch.ones(2, P))


def test_fused_is_evits_mean_of_the_rest() -> None:
    x, scores = torch.randn(P, D), torch.rand(P)
    order = sorted(range(P), key=lambda j: -scores[j])
    best, rest = order[: K - 1], order[K - 1 :]
    mean = sum(scores[j] * x[j] for j in rest) / sum(scores[j] for j in rest)
    expected = torch.stack([*(x[j] for j in best), mean])
    torch.testing.assert_close(merge.fused(scores[None], K)[0] @ x, expected, **CLOSE)


def test_dominant_and_contextual_tokens_are_visionzips() -> None:
    x, metric, scores = torch.randn(P, D), torch.randn(P, 8), torch.rand(P)
    best = sorted(range(P), key=lambda j: -scores[j])[:6]
    others = [j for j in range(P) if j not in best]
    targets = others[:: len(others) // 4][:4]
    found = {t: [] for t in targets}
    for j in set(others) - set(targets):
        found[max(targets, key=lambda t: cosine(metric[j], metric[t]))].append(x[j])
    zero = torch.zeros(D)
    contextual = [x[t] + (sum(g) / len(g) if g else zero) for t, g in found.items()]
    expected = torch.stack([*(x[j] for j in best), *contextual])
    matrix = merge.dominant_contextual(scores[None], metric[None], 6, 4)[0]
    torch.testing.assert_close(matrix @ x, expected, **CLOSE)


def test_the_rest_joins_its_most_similar_kept_token() -> None:
    x, metric = torch.randn(P, D), torch.randn(P, 8)
    size = torch.randint(1, 4, (P,)).float()
    kept = [3, 0, 11, 17]
    groups = {k: [k] for k in kept}
    for j in set(range(P)) - set(kept):
        groups[max(kept, key=lambda k: cosine(metric[j], metric[k]))].append(j)
    mean = lambda group: sum(size[j] * x[j] for j in group) / sum(size[j] for j in group)  # noqa: E731
    expected = torch.stack([mean(group) for group in groups.values()])
    indices = torch.tensor([kept])
    places = merge.merging(indices, merge.nearest_kept(metric[None], indices), P)
    found = merge.weighted_mean(places, size[None])[0] @ x
    torch.testing.assert_close(found, expected, **CLOSE)


def test_complete_matching_has_no_chains() -> None:
    metric, importance = torch.randn(P, 8), torch.rand(P)
    nearest = [max(cosine(metric[j], metric[i]) for i in range(P) if i != j) for j in range(P)]
    leaving = sorted(range(P), key=lambda j: importance[j] - nearest[j])[: P - K]
    stay = [j for j in range(P) if j not in leaving]
    matrix = merge.complete(metric[None], importance[None], K)[0]
    rows = {int(row.argmax()) if row.sum() == 1 else None for row in matrix}
    for j in leaving:
        target = max(stay, key=lambda i: cosine(metric[j], metric[i]))
        together = matrix[:, j].argmax()
        assert matrix[together, target] == 1 and matrix[:, j].sum() == 1
    assert matrix.sum() == P and None in rows


def test_feathers_first_stage_is_the_best_beside_a_grid() -> None:
    scores, guard = torch.rand(2, P), torch.tensor([2, 9, 16])
    found = merge.top_beside(scores, guard, 8)
    for b in range(2):
        others = sorted(set(range(P)) - {2, 9, 16}, key=lambda j: -scores[b, j])
        assert found[b].tolist() == [2, 9, 16, *others[:5]]


def test_best_rows_are_whole_rows_of_highest_sum() -> None:
    scores = torch.rand(1, 30)
    sums = [float(scores[0, 5 * r : 5 * r + 5].sum()) for r in range(6)]
    rows = sorted(range(6), key=lambda r: -sums[r])[:3]
    expected = [5 * r + c for r in rows for c in range(5)]
    assert merge.best_rows(scores, 5, 15)[0].tolist() == expected


def test_ascending_sorts_indices() -> None:
    indices = torch.randperm(50).unsqueeze(0)
    assert torch.equal(choose.ascending(indices)[0], torch.arange(50))


@pytest.mark.parametrize("side", [7, 8])
def test_every_prefix_of_the_spread_order_covers_the_grid(side: int) -> None:
    order = merge.spread_order(side)
    assert sorted(order) == list(range(side * side))
    for num in (8, 16, 24, 32):
        chosen = [divmod(place, side) for place in order[:num]]
        farthest = max(
            min(math.dist((r, c), other) for other in chosen)
            for r in range(side)
            for c in range(side)
        )
        # A square lattice of that many points would leave 0.7 of this.
        assert farthest <= 1.25 * side / math.sqrt(num)
