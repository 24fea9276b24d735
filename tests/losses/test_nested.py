"""Matryoshka: the mean over prefixes, and prefixes that learn to stand alone."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from compress.errors import PocketclipError
from compress.losses.affinity import affinity_mimicking
from compress.losses.nested import nested_affinity
from compress.stages import distill
from compress.work import Work


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_it_is_the_mean_over_prefixes_made_unit() -> None:
    u, v, t, w = (unit(6, 8, seed=i) for i in range(4))
    wanted = 0.0
    for dim in (2, 8):
        cut = [F.normalize(x[:, :dim], dim=-1) for x in (u, v)]
        wanted += float(affinity_mimicking(*cut, t, w, 20.0, 30.0)) / 2
    assert abs(float(nested_affinity(u, v, t, w, (2, 8), 20.0, 30.0)) - wanted) < 1e-6


def test_training_on_a_prefix_makes_it_stand_alone() -> None:
    teacher = unit(16, 8, seed=0)
    raw = torch.randn(16, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    first = None
    for _ in range(150):
        u = F.normalize(raw, dim=-1)
        loss = nested_affinity(u, u, teacher, teacher, (4, 12), 10.0, 10.0)
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first is not None and float(loss) < first - 0.1
    short = F.normalize(raw.detach()[:, :4], dim=-1)
    own = (short @ short.T).fill_diagonal_(-2).argmax(1)
    theirs = (teacher @ teacher.T).fill_diagonal_(-2).argmax(1)
    assert (own == theirs).float().mean() > 0.6


def test_the_stage_asks_for_dimensions_that_exist(work: Work, tmp_path: Path) -> None:
    short = {"steps": 2, "batch_size": 8, "affinity": 0.0, "nested": 1.0, "precision": "fp32"}
    distill.run(work, distill.Config(**short, nested_dims=(4, 16)), tmp_path / "a")
    with pytest.raises(PocketclipError, match="nested_dims: 32 is more than the width 16"):
        distill.run(work, distill.Config(**short, nested_dims=(32,)), tmp_path / "b")
