"""Replay of stored photo augmentation against torchvision's own operations."""

import random

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as F

from compress.data import param_aug
from compress.data.param_aug import OPERATIONS, Crops, replay
from compress.errors import PocketclipError


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
    return Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("magnitude", [0.27, -0.09])
@pytest.mark.parametrize("op", range(len(OPERATIONS)))
def test_each_operation_is_torchvisions(photo: Image.Image, op: int, magnitude: float) -> None:
    scale = {3: 100, 4: 100, 5: 100}.get(op, 1)
    value = {10: 5, 11: 178.5}.get(op, magnitude * scale)
    ours = replay(photo, [[3, 5, 60, 70], [[op, value], [0, 0.0]]], 48, "bicubic")
    crop = F.resized_crop(photo, 3, 5, 60, 70, [48, 48], InterpolationMode.BICUBIC)
    theirs = autoaugment._apply_op(crop, OPERATIONS[op], value, InterpolationMode.NEAREST, None)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_drawn_magnitudes_are_those_of_datacompdr() -> None:
    chance, seen = random.Random(0), {}
    for _ in range(2000):
        _, operations = Crops().draw(640, 480, chance)
        for op, magnitude in operations:
            seen.setdefault(op, set()).add(round(abs(magnitude), 3))
    expected = {1: 0.09, 2: 0.09, 3: 30.453, 4: 30.453, 5: 9.0, 6: 0.27, 9: 0.27, 11: 178.5}
    assert {op: seen[op] for op in expected} == {op: {value} for op, value in expected.items()}
    assert set(seen) == set(range(14))


def test_crops_lie_inside_and_vary(photo: Image.Image) -> None:
    chance, areas = random.Random(1), []
    for _ in range(200):
        [top, left, height, width], _ = Crops().draw(photo.width, photo.height, chance)
        assert 0 <= top <= photo.height - height and 0 <= left <= photo.width - width
        areas.append(width * height / (photo.width * photo.height))
    assert min(areas) < 0.2 and max(areas) > 0.8


def test_missing_transforms_are_passed_over(photo: Image.Image) -> None:
    box = [[3, 5, 60, 70]]
    plain = np.asarray(replay(photo, box, 32, "bilinear"))
    assert np.array_equal(np.asarray(replay(photo, [*box, None], 32, "bilinear")), plain)


def test_a_crop_outside_of_the_picture_is_refused(photo: Image.Image) -> None:
    with pytest.raises(PocketclipError, match="not the picture that the teachers saw"):
        replay(photo, [[0, 0, 91, 70]], 32, "bicubic")
    with pytest.raises(PocketclipError, match="unknown operation 14"):
        replay(photo, [[0, 0, 9, 9], [[14, 0.0]]], 32, "bicubic")
    assert set(param_aug.APPLY) == set(range(len(OPERATIONS)))
