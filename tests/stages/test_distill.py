"""Distillation on tiny real data: it learns, it resumes, and stored equals online."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_clip

from compress import losses, terms
from compress.batches import Sampler, embed_images, embed_texts
from compress.data.store import FILE
from compress.errors import PocketclipError
from compress.feed import Batches, Views, teacher_scales
from compress.learner import Learner
from compress.masks import Inherit
from compress.objective import ALONE, EQUAL_WIDTHS, FROM_TEACHER, Ramp
from compress.phases import Phase
from compress.stages.distill import Config, run
from compress.train import CHECKPOINT, step_generator
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
    assert batches.store is not None
    [teacher] = batch.teachers
    generator = step_generator(0, 3)
    indices, _ = batches.sampler.draw(8, generator)
    captions = batches.sampler.captions(indices, generator)
    view = torch.randint(2, (8,), generator=generator)
    online = Batches(
        student_work, stored.model_copy(update={"teacher": "online"}), batches.sampler, tmp_path
    )
    images = student_work.data.pairs.images[indices]
    views = Views(images, batches.store.parameters[indices, view])
    expected = online._teacher_images(views)
    # bfloat16 keeps 8 bits: unit vectors of width 16 agree to about 1e-2 per entry
    torch.testing.assert_close(teacher.u, expected, rtol=0, atol=2e-2)
    torch.testing.assert_close(teacher.v, online._teacher_texts(captions), rtol=0, atol=2e-2)


def test_blended_pictures_are_the_same_for_both(student_work: Work, tmp_path: Path) -> None:
    """Each picture is itself or a mix with the next one; the teacher embeds the very same."""
    plain = Config(teacher="online", **SHORT)
    cfg = plain.model_copy(update={"blend": 0.5})
    sampler = Sampler(student_work.data.pairs)
    alone = Batches(student_work, plain, sampler, tmp_path).at(3).pixels
    batch = Batches(student_work, cfg, sampler, tmp_path).at(3)
    blended = 0
    for row in range(len(alone)):
        toward = alone[(row + 1) % len(alone)] - alone[row]
        moved = batch.pixels[row] - alone[row]
        share = float((moved * toward).sum() / (toward * toward).sum())
        assert 0 <= share <= 1
        torch.testing.assert_close(moved, share * toward, rtol=0, atol=1e-5)
        blended += share > 0
    assert 0 < blended < len(alone)
    with torch.no_grad():
        expected = embed_images(student_work.teacher.model.image, batch.pixels)
    torch.testing.assert_close(batch.teachers[0].u, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "online", "clip": 1.0}, "clip has no right caption"),
        ({"teacher": "stored"}, "no store holds blended"),
    ],
)
def test_blending_without_targets_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(blend=0.5, **SHORT, **settings)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"affinity": 0.0}, "nothing to learn from"),
        ({"checkpoint_every": 120}, "must be a multiple of bank_every"),
        ({"micro_batch_size": 4, "matching": 1.0}, "need whole batches"),
        ({"micro_batch_size": 4, "masked_language": 1.0}, "need whole batches"),
        ({"steps": 9, "inherit": {"keep": 0.5, "prune_step": 9}}, "before the last of 9 steps"),
        ({"stream": {}, "languages": ("de",)}, "languages need pairs in memory"),
        ({"strategy": "fsdp2", "precision": "fp16"}, "fsdp2 needs precision: bf16 or fp32"),
        ({"strategy": "fsdp2", "inherit": {"keep": 0.5, "prune_step": 9}}, "use ddp"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(settings)


def test_masks_and_a_moving_average_are_refused_together(work: Work) -> None:
    cfg = Config(momentum=1.0, inherit=Inherit(keep=0.5, prune_step=2), **SHORT)
    with pytest.raises(PocketclipError, match="inherit cannot be used with a moving average"):
        Learner(work.clip, cfg, (16,), work.teacher.model.config)


def test_a_learnt_scale_stops_at_100(student_work: Work, tmp_path: Path) -> None:
    cfg = Config(affinity=0.0, clip=1.0, scale=None, **SHORT)
    batch = Batches(student_work, cfg, Sampler(student_work.data.pairs), tmp_path).at(0)
    model = student_work.clip.model
    learner = Learner(student_work.clip, cfg, (16,), student_work.teacher.model.config)
    with torch.no_grad():
        model.logit_scale.fill_(8.0)
        loss, _ = learner(batch, 0, nullcontext())
        u = embed_images(model.image, batch.pixels)
        v = embed_texts(model.text, batch.tokens)
    torch.testing.assert_close(loss, losses.clip_info_nce(u, v, 100.0))


@pytest.mark.parametrize("loss", EQUAL_WIDTHS)
def test_a_student_of_another_embedding_width_is_projected(
    work: Work, tmp_path: Path, loss: str, loss_at: Callable[[Path, int], float]
) -> None:
    narrow = replace(work, clip=tiny_clip(embed_dim=8))
    cfg = Config(**{"affinity": 0.0, loss: 1.0}, steps=25, **SHORT)
    student = run(narrow, cfg, tmp_path).clip.model
    assert student.config.embed_dim == 8
    assert loss_at(tmp_path, 24) < loss_at(tmp_path, 0)


def test_the_scale_is_fixed_or_starts_from_the_teachers(student_work: Work, tmp_path: Path) -> None:
    with torch.no_grad():
        student_work.teacher.model.logit_scale.fill_(3.0)
    for scale, expected in ((50.0, math.log(50.0)), (None, 3.0)):
        # A rate this small does not move a scale that is learnt.
        cfg = Config(scale=scale, steps=1, views=1, **{**SHORT, "lr": 1e-9})
        student = run(student_work, cfg, tmp_path / str(scale)).clip.model
        assert float(student.logit_scale.detach()) == pytest.approx(expected, abs=1e-6)
    assert teacher_scales(None, [3.0, 4.0]) == (3.0, 4.0)
    assert teacher_scales(7.0, [3.0, 4.0]) == (7.0, 7.0)
    with pytest.raises(PocketclipError, match="3 scales for 2 teachers"):
        teacher_scales((1.0, 2.0, 3.0), [3.0, 4.0])


def test_masked_features_see_a_quarter_of_the_patches(work: Work, tmp_path: Path) -> None:
    phases = (Phase(until=1.0, image_size=16, keep=0.75),)
    cfg = Config(masked_feature=1.0, phases=phases, teacher="online", **SHORT)
    batch = Batches(work, cfg, Sampler(work.data.pairs), tmp_path).at(0)
    assert batch.pixels.shape[-1] == 16
    assert batch.keep is not None and batch.keep.shape == (8, 3)  # of 4
    assert batch.masked_keep is not None and batch.masked_keep.shape == (8, 1)
    assert batch.masked_keep.unique().numel() > 1, "one draw for all images"


def test_neither_the_teacher_nor_the_model_that_came_in_is_changed(
    work: Work, tmp_path: Path
) -> None:
    itself = replace(work, teacher=work.clip)
    before = {name: value.clone() for name, value in work.clip.model.state_dict().items()}
    student = run(itself, Config(steps=2, clip=1.0, **SHORT), tmp_path).clip.model.state_dict()
    for name, value in work.clip.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(student["text.token.weight"], before["text.token.weight"])


def test_the_moving_average_follows_the_student(work: Work) -> None:
    cfg = Config(momentum=1.0, momentum_decay=0.75, **SHORT)
    learner = Learner(work.clip, cfg, (16,), work.teacher.model.config)
    assert learner.momentum is not None
    before = learner.momentum.text.token.weight.clone()
    with torch.no_grad():
        learner.student.text.token.weight.add_(1.0)
    learner.move_average_()
    torch.testing.assert_close(learner.momentum.text.token.weight, before + 0.25)


@pytest.mark.parametrize("loss", (*FROM_TEACHER, *ALONE))
def test_each_loss_alone_trains_and_resumes(work: Work, tmp_path: Path, loss: str) -> None:
    settings = {"affinity": 0.0, loss: 1.0, "bank_every": 1, "checkpoint_every": 1}
    cfg = Config(**settings, steps=3, num_hard_negatives=3, scale=None, **SHORT)
    # A teacher of another width, so that the helpers of a loss are part of what is resumed.
    biased = tiny_clip(seed=3, embed_dim=24)
    apart = replace(work, clip=tiny_clip(seed=1, width=16), teacher=biased)
    whole = run(apart, cfg, tmp_path).clip.model.state_dict()
    resumed = run(apart, cfg, tmp_path).clip.model.state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert any(
        not torch.equal(value, apart.clip.model.state_dict()[n]) for n, value in whole.items()
    )


def test_a_loss_at_weight_0_is_never_computed(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("computed")

    for name in set(terms.TERMS) - {"clip"}:
        monkeypatch.setitem(terms.TERMS, name, refuse)
    never = Ramp(start=1.0, end=0.0, until=0.01)
    cfg = Config(affinity=0.0, clip=1.0, hard_negatives=0.0, steps=2, **SHORT)
    run(work, cfg, tmp_path / "constant")
    assert not (tmp_path / "constant/store").exists()
    with pytest.raises(AssertionError, match="computed"):
        run(work, cfg.model_copy(update={"gradient": never}), tmp_path / "ramped")


def test_a_ramp_moves_and_then_stays() -> None:
    ramp = Ramp(start=1.0, end=-0.5, until=0.5)
    assert [ramp.at(done) for done in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.25, -0.5, -0.5]


def test_recomputed_activations_give_the_whole_batchs_gradients(
    student_work: Work, tmp_path: Path
) -> None:
    """GradCache with distillation: micro-batches of 3 against one batch of 8."""
    weights = {"clip": 1.0, "feature": 1.0, "interactive": 1.0, "divergence": 1.0}
    found = []
    for micro in (None, 3):
        cfg = Config(**weights, scale=None, micro_batch_size=micro, views=1, **SHORT)
        torch.manual_seed(4)
        student = replace(student_work.clip, model=copy.deepcopy(student_work.clip.model))
        at = replace(student_work, clip=student)
        feed = Batches(at, cfg, Sampler(at.data.pairs), tmp_path)
        learner = Learner(student, cfg, feed.widths, at.teacher.model.config)
        loss, _ = learner(feed.at(0), 0, nullcontext())
        loss.backward()
        found.append({n: p.grad for n, p in learner.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        largest = max(1.0, float(gradient.abs().max()))
        assert float((found[1][name] - gradient).abs().max()) <= 1e-5 * largest, name


def test_attentive_removal_trains_on_the_attended_patches(work: Work, tmp_path: Path) -> None:
    phases = (Phase(until=1.0, image_size=32, keep=0.5),)
    cfg = Config(steps=3, phases=phases, removal="attentive", **SHORT)
    attentive = run(work, cfg, tmp_path / "a").clip.model.state_dict()
    random = cfg.model_copy(update={"removal": None})
    other = run(work, random, tmp_path / "b").clip.model.state_dict()
    assert not torch.equal(attentive["image.patch.weight"], other["image.patch.weight"])


def test_the_student_reads_other_languages_than_its_teacher(work: Work, tmp_path: Path) -> None:
    labels = [{"de": f"ein {name}", "fr": f"un {name}"} for name in work.data.pairs.names]
    work.data.pairs.labels[:] = labels
    cfg = Config(languages=("de", "fr"), teacher="online", **SHORT)
    batch = Batches(work, cfg, Sampler(work.data.pairs), tmp_path).at(0)
    spoken = work.clip.tokenizer([x for label in labels for x in label.values()])
    assert all((row == spoken).all(dim=1).any() for row in batch.tokens)
    english = Batches(
        work, cfg.model_copy(update={"languages": ()}), Sampler(work.data.pairs), tmp_path
    ).at(0)
    torch.testing.assert_close(batch.teachers[0].v, english.teachers[0].v)


def test_a_language_without_labels_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match="no training pair has labels in xx"):
        run(work, Config(languages=("xx",), **SHORT), tmp_path)
