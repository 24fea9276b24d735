"""Data reduction: which pairs stay, and that training reads what was written."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from compress.data.augment import plain
from compress.nn.clusters import spherical_kmeans
from compress.stages.curate import (
    Config,
    balanced,
    best_of_each,
    best_share,
    embed,
    run,
    select,
)
from compress.work import Data, Work


def test_similarity_is_the_teachers_best_caption(work: Work) -> None:
    _, matches = embed(work, "best")
    _, first = embed(work, "first")
    pairs, teacher = work.data.pairs, work.teacher
    pixels = plain(pairs.images[3:4], 32, teacher.preprocess)
    with torch.no_grad():
        u = F.normalize(teacher.model.encode_image(pixels), dim=-1)
        v = F.normalize(teacher.model.encode_text(teacher.tokenizer(pairs.captions[3])), dim=-1)
    scores = (v @ u[0]).tolist()
    assert float(matches[3]) == pytest.approx(max(scores), abs=1e-5)
    assert float(first[3]) == pytest.approx(scores[0], abs=1e-5)


def test_the_best_share_stays(work: Work) -> None:
    kept = select(work, Config(score=0.5))
    _, matches = embed(work, "best")
    assert len(kept) == 4
    left = sorted(set(range(8)) - set(kept.tolist()))
    assert matches[kept].min() >= matches[left].max()


def test_each_cluster_keeps_its_best() -> None:
    clusters = torch.tensor([0, 1, 0, 1, 0, 2])
    matches = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3, 0.0])
    kept = best_of_each(clusters, matches, 1 / 3)
    assert sorted(kept.tolist()) == [1, 2, 5]


def test_kmeans_finds_separate_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    truth = torch.arange(4).repeat_interleave(25)
    points = F.normalize(centres[truth] + 0.05 * torch.randn(100, 16, generator=generator), dim=-1)
    found, _ = spherical_kmeans(points, 4, generator)
    groups = {frozenset((found == n).nonzero()[:, 0].tolist()) for n in range(4)}
    assert groups == {frozenset(range(25 * n, 25 * n + 25)) for n in range(4)}


def test_balancing_keeps_rare_names_and_thins_common_ones() -> None:
    captions = [["a red bar"]] * 400 + [["a teapot"]] * 5 + [["nothing known"]] * 20
    kept = balanced(captions, ["red bar", "teapot"], 40, torch.Generator().manual_seed(0))
    counts = Counter(captions[n][0] for n in kept.tolist())
    assert counts["a teapot"] == 5 and counts["nothing known"] == 0
    # binomial of 400 draws at 1/10: 40, five standard deviations are 30
    assert 10 < counts["a red bar"] < 70


def test_the_rules_apply_one_after_the_other(work: Work) -> None:
    """Clusters and names are of what the score has left, counted by the pairs' own indices."""
    images, matches = embed(work, "best")
    best = best_share(matches, 0.75)
    assert len(best) == 6
    by_score = select(work, Config(score=0.75))
    assert by_score.tolist() == sorted(best.tolist())
    generator = torch.Generator().manual_seed(work.seed)
    clusters, _ = spherical_kmeans(images[best], 2, generator)
    expected = []
    for cluster in clusters.unique():
        members = best[clusters == cluster].tolist()
        num = max(1, round(len(members) / 2))
        expected += sorted(members, key=lambda n: -float(matches[n]))[:num]
    kept = select(work, Config(score=0.75, clusters=2, per_cluster=0.5))
    assert kept.tolist() == sorted(expected) and len(kept) < 6
    assert select(work, Config(score=0.75, clusters=2, per_cluster=0.5, balance=9)).tolist() == (
        kept.tolist()
    )


def test_what_is_written_is_what_was_chosen(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(work, Config(score=0.4), out)
    curated = Data(train=(out / "curated.tar",), image_size=32)
    kept = select(work, Config(score=0.4)).tolist()
    assert curated.pairs.keys == [work.data.pairs.keys[n] for n in kept]
    assert curated.pairs.captions == [work.data.pairs.captions[n] for n in kept]
    assert torch.equal(curated.pairs.images, work.data.pairs.images[kept])


def test_nothing_to_select_by_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing to select by"):
        Config()
