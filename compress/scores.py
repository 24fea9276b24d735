"""Retrieval arithmetic on unit embeddings: ranks, overlaps and bootstrap intervals, in numpy.

Q queries, G gallery items, E embedding, K metrics, R resamples.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# Scores held at once: 16 million float32 are 64 MB, whatever the size of the data set.
_SCORES_AT_ONCE = 16_000_000


def _blocks(num_queries: int, num_gallery: int) -> Iterator[slice]:
    step = max(1, _SCORES_AT_ONCE // max(1, num_gallery))
    for start in range(0, num_queries, step):
        yield slice(start, min(start + step, num_queries))


def relevant_ranks(
    queries: Floats, gallery: Floats, relevant: Callable[[slice], Booleans]
) -> Integers:
    """Rank of each query's best correct item, 0 being first; a tie with a wrong item is lost.

    queries [Q, E] and gallery [G, E] are unit vectors; `relevant(block)` gives bool [block, G] for
    a slice of the queries, at least one true in each row. Returns int64 [Q]. Counting ties as lost
    keeps an encoder that maps everything to one point at zero instead of at a perfect score.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    for block in _blocks(len(queries), len(gallery)):
        correct = relevant(block)  # [q, G]
        assert correct.any(axis=1).all(), "a query has no correct item"
        scores = queries[block] @ gallery.T  # [q, G]
        best = np.where(correct, scores, -np.inf).max(axis=1)  # [q]
        ranks[block] = ((scores >= best[:, None]) & ~correct).sum(axis=1)
    return ranks


def top_items(queries: Floats, gallery: Floats, k: int) -> Integers:
    """The k best gallery items of each query, best first, equal scores in gallery order: [Q, k]."""
    k = min(k, len(gallery))
    top = np.empty((len(queries), k), dtype=np.int64)
    for block in _blocks(len(queries), len(gallery)):
        scores = queries[block] @ gallery.T
        top[block] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return top


def overlap(first: Integers, second: Integers) -> Doubles:
    """Share of items that two lists of k distinct items have in common: [Q, k] twice to [Q]."""
    assert first.shape == second.shape, (first.shape, second.shape)
    return (first[:, :, None] == second[:, None, :]).sum(axis=(1, 2)) / first.shape[1]


def bootstrap_interval(samples: Doubles, resamples: int, seed: int) -> Doubles:
    """95 % percentile interval of each column's mean, rows resampled together: [N, K] to [2, K].

    One set of weights serves all K columns, so metrics of the same queries stay paired.
    """
    num_samples = len(samples)
    assert num_samples > 0, "no samples"
    random = np.random.default_rng(seed)
    means = np.empty((resamples, samples.shape[1]))
    step = max(1, _SCORES_AT_ONCE // num_samples)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        even = np.full(num_samples, 1 / num_samples)
        counts = random.multinomial(num_samples, even, size=stop - start)  # [r, N]
        means[start:stop] = counts @ samples / num_samples
    return np.percentile(means, [2.5, 97.5], axis=0)
