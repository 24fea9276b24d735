"""Ranks, overlaps and intervals against slow loops and closed forms."""

import numpy as np
import pytest

from compress import scores


def unit(random, *shape):
    vectors = random.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def slow_ranks(queries, gallery, relevant):
    ranks = []
    for query, right in zip(queries, relevant):
        score = [float(np.dot(query, item)) for item in gallery]
        best = max(s for s, r in zip(score, right) if r)
        ranks.append(sum(s >= best for s, r in zip(score, right) if not r))
    return ranks


def test_ranks_equal_a_slow_loop_in_any_block_size(monkeypatch):
    random = np.random.default_rng(0)
    queries, gallery = unit(random, 37, 8), unit(random, 23, 8)
    relevant = random.random((37, 23)) < 0.1
    relevant[np.arange(37), random.integers(23, size=37)] = True
    expected = slow_ranks(queries, gallery, relevant)
    for at_once in (16_000_000, 60, 1):
        monkeypatch.setattr(scores, "_SCORES_AT_ONCE", at_once)
        found = scores.relevant_ranks(queries, gallery, lambda block: relevant[block])
        assert found.tolist() == expected


def test_encoder_that_collapsed_to_one_point_finds_nothing():
    same = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (6, 1))
    ranks = scores.relevant_ranks(same, same, lambda block: np.eye(6, dtype=bool)[block])
    assert ranks.tolist() == [5] * 6


def test_tied_items_that_are_all_correct_are_no_loss():
    same = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (3, 1))
    ranks = scores.relevant_ranks(same, same, lambda block: np.ones((3, 3), dtype=bool)[block])
    assert ranks.tolist() == [0, 0, 0]


def test_overlap_equals_set_intersection():
    random = np.random.default_rng(1)
    first = np.stack([random.permutation(30)[:10] for _ in range(20)])
    second = np.stack([random.permutation(30)[:10] for _ in range(20)])
    expected = [len(set(a) & set(b)) / 10 for a, b in zip(first, second)]
    assert scores.overlap(first, second).tolist() == expected


def test_top_items_are_the_best_first():
    random = np.random.default_rng(2)
    queries, gallery = unit(random, 5, 4), unit(random, 12, 4)
    for query, top in zip(queries, scores.top_items(queries, gallery, 3)):
        expected = sorted(range(12), key=lambda g: -float(query @ gallery[g]))[:3]
        assert top.tolist() == expected


def test_interval_of_a_fraction_has_the_width_of_the_normal_approximation():
    samples = (np.arange(1000) % 10 < 3).astype(float)[:, None]
    low, high = scores.bootstrap_interval(samples, resamples=4000, seed=0)[:, 0]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    # Percentiles of 4000 resamples wander by about 4 % of the half width.
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.1 * half)


def test_interval_depends_on_the_seed_alone(monkeypatch):
    samples = np.random.default_rng(3).random((50, 2))
    first = scores.bootstrap_interval(samples, 200, seed=7)
    assert np.array_equal(first, scores.bootstrap_interval(samples, 200, seed=7))
    assert not np.array_equal(first, scores.bootstrap_interval(samples, 200, seed=8))
