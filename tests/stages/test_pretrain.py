"""Contrastive pretraining on tiny real data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress.errors import PocketclipError
from compress.phases import Phase
from compress.stages.pretrain import Config, run
from compress.work import Work

SHORT = {
    "batch_size": 8,
    "warmup_steps": 2,
    "lr": 3e-3,
    "log_every": 1,
    "bank_every": 5,
    "checkpoint_every": 5,
}


def test_it_learns_the_names_of_eight_pictures(
    work: Work, tmp_path: Path, loss_at: Callable[[Path, int], float]
) -> None:
    phases = (Phase(until=0.3, image_size=16), Phase(until=0.6, image_size=32, keep=0.5))
    cfg = Config(steps=60, phases=phases, drop_path=0.1, optimizer="muon", **SHORT)
    result = run(work, cfg, tmp_path)
    assert loss_at(tmp_path, 59) < 0.8 * loss_at(tmp_path, 0)
    assert result.clip.provenance[-1]["step"] == "pretrain"


def test_a_phase_that_does_not_fit_the_patches_is_refused(work: Work, tmp_path: Path) -> None:
    cfg = Config(steps=2, phases=(Phase(until=1, image_size=20),), **SHORT)
    with pytest.raises(PocketclipError, match=r"phases\[0\].image_size: 20 is no multiple"):
        run(work, cfg, tmp_path)


def test_resume_gives_the_unbroken_runs_weights(work: Work, tmp_path: Path) -> None:
    cfg = Config(steps=8, drop_path=0.2, **SHORT)
    whole = {k: v.clone() for k, v in run(work, cfg, tmp_path).clip.model.state_dict().items()}
    resumed = run(work, cfg, tmp_path).clip.model.state_dict()  # goes on from step 5
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
