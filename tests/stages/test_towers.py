"""One tower learns while the teacher stands for the other: it is right, and it costs nothing."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_stream_feed import shard
from tiny import tiny_clip

import compress.clip
from compress import losses
from compress.batches import embed_images, embed_names, embed_texts
from compress.data.captions import Captions
from compress.errors import PocketclipError
from compress.feed import Feed, open_feed
from compress.learner import Learner
from compress.stages import distill, reinforce
from compress.stages.distill import Banks, Config
from compress.work import Work

SHORT = {"batch_size": 8, "warmup_steps": 2, "lr": 3e-3, "precision": "fp32", "log_every": 1}
OTHER = {"image": "text", "text": "image"}


@pytest.fixture
def student_work(work: Work) -> Work:
    """A teacher and a student of other weights and width."""
    return replace(work, clip=tiny_clip(seed=1, width=16), teacher=tiny_clip(seed=2))


def reinforced(work: Work, tmp_path: Path) -> Work:
    """The same with a store of its teacher's vectors and two captions a picture."""
    compress.clip.save(work.teacher, tmp_path / "teacher")
    settings = reinforce.Config(
        teachers=(str(tmp_path / "teacher"),), captions=Captions(source="own"), precision="fp32"
    )
    reinforce.run(work, settings, tmp_path / "reinforce")
    return replace(work, store=tmp_path / "reinforce" / reinforce.FOLDER)


def step(work: Work, cfg: Config, out: Path) -> tuple[Feed, Learner, torch.Tensor]:
    feed = open_feed(work, cfg, out)
    learner = Learner(work.clip, cfg, feed.widths, work.teacher.model.config)
    loss, _ = learner(feed.at(0), 0, nullcontext())
    return feed, learner, loss


def refuse(*arguments: Any, **named: Any) -> None:
    raise AssertionError("the tower at rest has run")


@pytest.mark.parametrize("side", OTHER)
def test_the_other_tower_rests(
    student_work: Work, tmp_path: Path, side: str, loss_at: Callable[[Path, int], float]
) -> None:
    before = {n: t.clone() for n, t in student_work.clip.model.state_dict().items()}
    cfg = Config(towers=(side,), steps=40, **SHORT)
    after = distill.run(student_work, cfg, tmp_path).clip.model.state_dict()
    for name in before:
        if name.startswith(OTHER[side]):
            assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after[f"{side}.position"], before[f"{side}.position"])
    assert loss_at(tmp_path, 39) < loss_at(tmp_path, 0) - 0.005


@pytest.mark.parametrize("side", OTHER)
@pytest.mark.parametrize("kind", ["stored", "online", "reinforced", "stream"])
def test_the_teacher_stands_for_it_in_every_feed(
    student_work: Work, tmp_path: Path, side: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The affinity is that of one student's and one teacher's embeddings; no pixels or tokens are
    made for the tower that rests, nor does it run.
    """
    settings: dict[str, Any] = {"teacher": kind}
    if kind == "reinforced":
        student_work = reinforced(student_work, tmp_path)
    if kind == "stream":
        sources = [{"shards": [str(shard(tmp_path / "a.tar", 8))]}]
        settings = {"teacher": "online", "stream": {"sources": sources}}
    cfg = Config.model_validate({"towers": (side,), "feature": 2.0, **settings, **SHORT})
    monkeypatch.setattr(getattr(student_work.clip.model, OTHER[side]), "forward", refuse)
    feed, learner, loss = step(student_work, cfg, tmp_path / "out")
    batch = feed.at(0)
    resting = getattr(learner.student, OTHER[side])
    assert not any(parameter.requires_grad for parameter in resting.parameters())
    assert (batch.pixels.numel() == 0) == (side == "text")
    assert (batch.tokens.numel() == 0) == (side == "image")
    expected = torch.zeros(())
    captions = [(batch.teachers, batch.tokens), (batch.synthetic_teachers, batch.synthetic)]
    for [t], tokens in captions[: 2 if kind == "reinforced" else 1]:
        u = embed_images(learner.student.image, batch.pixels) if side == "image" else t.u
        v = t.v if side == "image" else embed_texts(learner.student.text, tokens)
        expected = expected + losses.affinity_mimicking(u, v, t.u, t.v, 50.0, 50.0)
        own, wanted = (u, t.u) if side == "image" else (v, t.v)
        expected = expected + 2.0 * (own - wanted).square().sum(dim=1).mean()
    torch.testing.assert_close(loss, expected)


def test_a_resting_text_tower_leaves_the_teachers_bank(student_work: Work, tmp_path: Path) -> None:
    cfg = Config(towers=("image",), bank=1.0, affinity=0.0, **SHORT)
    feed, learner, _ = step(student_work, replace_bank(cfg), tmp_path)
    bank = Banks(learner, feed, student_work, cfg).at(0)
    assert bank is not None
    torch.testing.assert_close(bank[0], bank[1][0])
    torch.testing.assert_close(bank[0], feed.teacher_bank()[0])


def test_a_resting_text_tower_ranks_names_by_itself_where_asked(
    student_work: Work, tmp_path: Path
) -> None:
    cfg = Config(towers=("image",), bank=1.0, affinity=0.0, own_bank=True, **SHORT)
    feed, learner, _ = step(student_work, replace_bank(cfg), tmp_path)
    banks = Banks(learner, feed, student_work, cfg)
    student, [teacher] = banks.at(0) or (torch.empty(0), (torch.empty(0),))
    templates = list(student_work.data.templates)
    torch.testing.assert_close(student, embed_names(student_work.clip, feed.names, templates))
    torch.testing.assert_close(teacher, feed.teacher_bank()[0])
    assert banks.at(cfg.bank_every) is not None and not torch.allclose(student, teacher)


def replace_bank(cfg: Config) -> Config:
    """The same without a bank, which a step by hand would lack."""
    return cfg.model_copy(update={"bank": 0.0, "feature": 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"towers": ()}, "name at least one"),
        ({"towers": ("image",), "momentum": 1.0}, "image cannot learn by momentum alone"),
        ({"towers": ("text", "text"), "bank": 1.0}, "text cannot learn by bank alone"),
        ({"towers": ("text",), "masked_feature": 1.0}, "cannot learn by masked_feature"),
        (
            {"towers": ("image",), "inherit": {"keep": 0.5, "prune_step": 9}},
            "image cannot learn by inherit alone",
        ),
        ({"towers": ("image",), "affinity": 0.0, "clip": 1.0}, "no loss asks the teacher"),
        ({"towers": ("text",), "own_bank": True}, "no image tower learns by bank"),
        ({"bank": 1.0, "own_bank": True}, "the text tower learns too"),
    ],
)
def test_towers_that_cannot_learn_alone_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(settings)


def test_a_teacher_of_another_width_cannot_stand_for_a_tower(
    student_work: Work, tmp_path: Path
) -> None:
    wide = replace(student_work, teacher=tiny_clip(embed_dim=24))
    with pytest.raises(PocketclipError, match="24 entries cannot stand for the text tower's of 16"):
        distill.run(wide, Config(towers=("image",), steps=1, **SHORT), tmp_path)
