"""Our folder opens in open_clip itself, and comes back as it went."""

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.sources import folder
from compress.stages.inherit import Config as Inherit
from compress.stages.inherit import Shape, run
from compress.work import Work
from export.open_clip import Config, load, write

TEXTS = ["", "a red square", "x" * 80, "Ünïcode", "红色方块", "🟥"]


def before_padding(ids: torch.Tensor) -> list[list[int]]:
    """Each row up to its end mark: a causal tower does not see the rest."""
    return [row[: int(row.argmax()) + 1].tolist() for row in ids]


def test_open_clip_gives_the_same_ids_and_embeddings(clip: Clip, tmp_path: Path) -> None:
    write(clip, Config(precision="fp32"), tmp_path / "out")
    name = f"local-dir:{tmp_path / 'out'}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    ids = open_clip.get_tokenizer(name)(TEXTS)
    assert before_padding(ids) == before_padding(clip.tokenizer(TEXTS))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for theirs, ours in (
            (model.eval().encode_image(pixels), clip.model.encode_image(pixels)),
            (model.encode_text(ids), clip.model.encode_text(clip.tokenizer(TEXTS))),
        ):
            torch.testing.assert_close(F.normalize(theirs), F.normalize(ours), rtol=0, atol=1e-5)


def test_it_comes_back_through_our_own_door(clip: Clip, tmp_path: Path) -> None:
    write(clip, Config(precision="fp32"), tmp_path / "out")
    again = folder.load(tmp_path / "out")
    assert again.model.config == clip.model.config and again.license == clip.license
    assert again.preprocess == clip.preprocess
    for name, value in clip.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert before_padding(again.tokenizer(TEXTS)) == before_padding(clip.tokenizer(TEXTS))


def test_half_precision_halves_the_file_and_stays_near(clip: Clip, tmp_path: Path) -> None:
    for precision in ("fp16", "fp32"):
        write(clip, Config(precision=precision), tmp_path / precision)
    small, large = (
        (tmp_path / p / "open_clip_model.safetensors").stat().st_size for p in ("fp16", "fp32")
    )
    assert small < 0.6 * large
    encoder = load(tmp_path / "fp16")
    tokens = clip.tokenizer(TEXTS)
    with torch.no_grad():
        ours = F.normalize(clip.model.encode_text(tokens), dim=-1)
    assert (encoder.encode_text(tokens) * ours).sum(1).min() > 0.9999


def test_a_shape_that_open_clip_cannot_state_is_refused(work: Work, tmp_path: Path) -> None:
    student = run(work, Inherit(vision=Shape(heads=2)), tmp_path).clip
    with pytest.raises(PocketclipError, match=r"vision tower has 2 heads of 8 in a width of 32"):
        write(student, Config(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
