"""Distillation on tiny real data: it learns, it resumes, and stored equals online."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_clip

from compress.batches import Sampler
from compress.data.store import FILE
from compress.errors import PocketclipError
from compress.stages import distill
from compress.stages.distill import Batches, Config, run
from compress.train import CHECKPOINT
from compress.work import Work

SHORT = {"batch_size": 8, "warmup_steps": 2, "lr": 3e-3, "precision": "fp32", "log_every": 1}


@pytest.fixture
def student_work(work: Work) -> Work:
    """A teacher and a student of other weights and width."""
    return replace(work, clip=tiny_clip(seed=1, width=16), teacher=tiny_clip(seed=2))


@pytest.mark.parametrize(
    "weights", [{"affinity": 1.0}, {"affinity": 0.0, "feature": 1.0}, {"bank": 1.0}]
)
def test_the_student_comes_nearer_to_its_teacher(
    student_work: Work,
    tmp_path: Path,
    weights: dict[str, float],
    loss_at: Callable[[Path, int], float],
) -> None:
    cfg = Config(steps=40, bank_every=10, checkpoint_every=10, **SHORT, **weights)
    run(student_work, cfg, tmp_path)
    assert loss_at(tmp_path, 39) < loss_at(tmp_path, 0) - 0.005


def test_stored_embeddings_are_the_online_ones(student_work: Work, tmp_path: Path) -> None:
    stored = Config(teacher="stored", views=2, **SHORT)
    batches = Batches(student_work, stored, Sampler(student_work.data.pairs), tmp_path)
    batch = batches.at(3)
    assert batches.store is not None and batch.teacher_u is not None
    generator = distill.step_generator(0, 3)
    indices, _ = batches.sampler.draw(8, generator)
    captions = batches.sampler.captions(indices, generator)
    view = torch.randint(2, (8,), generator=generator)
    online = Batches(
        student_work, stored.model_copy(update={"teacher": "online"}), batches.sampler, tmp_path
    )
    images = student_work.data.pairs.images[indices]
    expected = online._teacher_images(images, batches.store.parameters[indices, view])
    # bfloat16 keeps 8 bits: unit vectors of width 16 agree to about 1e-2 per entry
    torch.testing.assert_close(batch.teacher_u, expected, rtol=0, atol=2e-2)
    torch.testing.assert_close(batch.teacher_v, online._teacher_texts(captions), rtol=0, atol=2e-2)


def test_a_store_of_another_teacher_is_refused(student_work: Work, tmp_path: Path) -> None:
    cfg = Config(steps=1, **SHORT)
    run(student_work, cfg, tmp_path)
    assert (tmp_path / "store" / FILE).exists()
    with pytest.raises(PocketclipError, match="made with another teacher"):
        run(replace(student_work, teacher=tiny_clip(seed=3)), cfg, tmp_path)


def test_a_damaged_store_is_named(student_work: Work, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / FILE).write_bytes(b"12345678 not a store")
    with pytest.raises(PocketclipError, match=r"store\.safetensors: damaged store"):
        run(student_work, Config(steps=1, **SHORT), tmp_path)


def test_resume_gives_the_unbroken_runs_weights(student_work: Work, tmp_path: Path) -> None:
    cfg = Config(steps=6, checkpoint_every=2, bank=0.5, bank_every=2, **SHORT)
    whole = run(student_work, cfg, tmp_path / "whole").clip.model.state_dict()
    assert (tmp_path / "whole" / CHECKPOINT).exists()  # of step 4: go on from it
    again = replace(student_work, clip=tiny_clip(seed=9, width=16))
    resumed = run(again, cfg, tmp_path / "whole").clip.model.state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing to learn from"):
        Config(affinity=0.0)
    with pytest.raises(ValidationError, match="must be a multiple of bank_every"):
        Config(checkpoint_every=120)


def test_feature_distance_needs_equal_widths(work: Work, tmp_path: Path) -> None:
    narrow = replace(work, clip=tiny_clip(embed_dim=8))
    with pytest.raises(
        PocketclipError, match=r"distill\.feature: .*width 8 is not the teacher's 16"
    ):
        run(narrow, Config(feature=1.0, **SHORT), tmp_path)


def test_neither_the_teacher_nor_the_model_that_came_in_is_changed(
    work: Work, tmp_path: Path
) -> None:
    itself = replace(work, teacher=work.clip)
    before = {name: value.clone() for name, value in work.clip.model.state_dict().items()}
    student = run(itself, Config(steps=2, clip=1.0, **SHORT), tmp_path).clip.model.state_dict()
    for name, value in work.clip.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(student["text.token.weight"], before["text.token.weight"])
