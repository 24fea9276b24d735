"""Weight inheritance."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress.clip import load, save
from compress.errors import PocketclipError
from compress.model import ClipModel, initialise_
from compress.stages.inherit import Config, Shape, VisionShape, run
from compress.work import Work


def test_a_full_size_student_is_the_teacher(work: Work, tmp_path: Path) -> None:
    student = run(work, Config(), tmp_path).clip.model
    for name, value in work.clip.model.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_a_smaller_student_holds_the_teachers_leading_channels(work: Work, tmp_path: Path) -> None:
    cfg = Config(vision=VisionShape(width=16, layers=1), text=Shape(width=24, mlp_ratio=1))
    student, teacher = run(work, cfg, tmp_path).clip.model, work.clip.model
    assert student.config.vision.heads == (2,) and student.config.text.heads == (3, 3)
    assert student.config.text.mlp_width == (24, 24)
    assert student.config.embed_dim == teacher.config.embed_dim
    torch.testing.assert_close(
        student.image.projection.weight, teacher.image.projection.weight[:, :16]
    )
    torch.testing.assert_close(
        student.text.blocks[1].attention.out.weight,
        teacher.text.blocks[1].attention.out.weight[:24, :24],
    )
    assert student.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 16)


def test_one_layer_of_two_comes_from_where_the_rule_says(work: Work, tmp_path: Path) -> None:
    three = replace(work, clip=tiny_clip(layers=3))
    for rule, origin in (("uniform", 2), ("front", 1)):
        cfg = Config(vision=VisionShape(layers=2), layer_rule=rule)
        student = run(three, cfg, tmp_path).clip.model
        expected = three.clip.model.image.blocks[origin].mlp.up.weight
        assert torch.equal(student.image.blocks[1].mlp.up.weight, expected), rule


def test_a_tower_without_a_projection_gets_one_that_changes_nothing(
    work: Work, tmp_path: Path
) -> None:
    clip = tiny_clip(embed_dim=32)
    vision = clip.model.config.vision.model_copy(update={"projection": "none"})
    model = ClipModel(clip.model.config.model_copy(update={"vision": vision}))
    initialise_(model)
    teacher = replace(work, clip=replace(clip, model=model))
    student = run(teacher, Config(vision=VisionShape(width=16)), tmp_path).clip.model
    assert student.config.vision.projection == "linear"
    assert torch.equal(student.image.projection.weight, torch.eye(32)[:, :16])


def test_irregular_students_save_and_load(work: Work, tmp_path: Path) -> None:
    student = run(work, Config(vision=VisionShape(width=24, heads=1, mlp_ratio=1.5)), tmp_path).clip
    save(student, tmp_path / "student")
    again = load(tmp_path / "student")
    assert again.model.config == student.model.config
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.model.encode_image(pixels), student.model.encode_image(pixels))
    assert again.provenance[-1]["step"] == "inherit"


def test_a_larger_student_is_refused_with_the_place(work: Work, tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match=r"inherit\.vision\.width: 64 is more than .* 32"):
        run(work, Config(vision=VisionShape(width=64)), tmp_path)


def test_smaller_pictures_give_what_the_teacher_gives_for_them(work: Work, tmp_path: Path) -> None:
    clip = run(work, Config(vision=VisionShape(image_size=16)), tmp_path).clip
    assert clip.preprocess.size == (16, 16) and clip.model.config.vision.image_size == 16
    pixels = torch.randn(2, 3, 16, 16)
    expected = work.clip.model.encode_image(pixels)  # interpolates its positions on the way
    torch.testing.assert_close(clip.model.encode_image(pixels), expected)
    with pytest.raises(PocketclipError, match=r"image_size: 20 must be a multiple"):
        run(work, Config(vision=VisionShape(image_size=20)), tmp_path)
