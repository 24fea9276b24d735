"""Preprocessing against open_clip's own evaluation transform."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from pydantic import ValidationError

from compress.errors import PocketclipError
from compress.preprocess import Preprocess

SIZES = [(97, 61), (61, 97), (64, 64), (40, 33), (64, 200), (65, 64), (1, 90), (130, 3)]


def picture(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth gradients with a hard rectangle and noise, uint8 [H, W, C]."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, channels))
    ramp = np.linspace(0, 190, width)[None, :, None] + np.zeros((height, 1, channels))
    ramp[height // 3 : height // 2, width // 4 : width // 2] = 20
    return (ramp + noise).astype(np.uint8)


def reference(image: Image.Image, contract: Preprocess) -> torch.Tensor:
    """open_clip's pixels for the same settings."""
    config = PreprocessCfg(
        size=contract.size,
        mean=contract.mean,
        std=contract.std,
        interpolation=contract.interpolation,
        resize_mode=contract.resize_mode,
        fill_color=contract.padding[0],
    )
    return image_transform_v2(config, is_train=False)(image)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES)
def test_rgb_equals_open_clip(size: tuple[int, int], interpolation: Any, mode: Any) -> None:
    contract = Preprocess(size=(64, 64), resize_mode=mode, interpolation=interpolation)
    image = Image.fromarray(picture(*size))
    assert_same(contract(image), reference(image, contract))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", SIZES[:5])
def test_oblong_input_equals_open_clip(size: tuple[int, int], mode: Any) -> None:
    contract = Preprocess(size=(48, 64), resize_mode=mode, padding=(7, 7, 7))
    image = Image.fromarray(picture(*size))
    assert_same(contract(image), reference(image, contract))


def test_grey_equals_open_clip() -> None:
    contract = Preprocess(size=(64, 64))
    image = Image.fromarray(picture(97, 61, 1)[..., 0])
    assert image.mode == "L"
    assert_same(contract(image), reference(image, contract))


def test_cmyk_without_black_equals_open_clip() -> None:
    contract = Preprocess(size=(64, 64))
    image = Image.fromarray(picture(97, 61)).convert("CMYK")
    assert_same(contract(image), reference(image, contract))


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "YCbCr"])
def test_other_modes_become_rgb_before_the_resize(mode: str) -> None:
    contract = Preprocess(size=(64, 64))
    values = picture(97, 61, 4)
    image = Image.fromarray(values, "CMYK") if mode == "CMYK" else Image.fromarray(values[..., :3])
    image = image.convert(mode)
    assert_same(contract(image), reference(image.convert("RGB"), contract))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_first(orientation: int) -> None:
    contract = Preprocess(size=(64, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture(97, 61)).save(file, "JPEG", exif=exif, quality=95)
    image = Image.open(file)
    assert_same(contract(image), reference(ImageOps.exif_transpose(image), contract))
    sideways = reference(image, contract)
    assert (orientation == 1) == torch.equal(contract(image), sideways)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_alpha_is_blended_over_the_background(background: tuple[int, int, int]) -> None:
    contract = Preprocess(size=(64, 64), background=background)
    values = picture(97, 61, 4, seed=1)
    alpha = values[..., 3:] / 255.0
    blended = values[..., :3] * alpha + np.array(background) * (1 - alpha)
    expected = reference(Image.fromarray(blended.round().astype(np.uint8)), contract)
    # Pillow blends in integers: off by one 8-bit step at most, and the filter's lobes add a little.
    step = 1 / 255 / min(contract.std)
    torch.testing.assert_close(
        contract(Image.fromarray(values, "RGBA")), expected, rtol=0, atol=2 * step
    )


def test_transparent_pixels_show_the_background_whatever_lies_beneath() -> None:
    contract = Preprocess(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), background=(255, 0, 51))
    pixels = contract(Image.new("RGBA", (9, 12), (1, 2, 3, 0)))
    expected = torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(pixels, expected)


def test_palette_transparency_is_blended() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=1)
    contract = Preprocess(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(contract(Image.open(file)), torch.ones(3, 8, 8))


def test_grey_with_alpha_is_blended() -> None:
    contract = Preprocess(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    pixels = contract(Image.new("LA", (8, 8), (0, 51)))
    torch.testing.assert_close(pixels, torch.full((3, 8, 8), 0.8))


@pytest.mark.parametrize("kind", ["I;16", "I", "png"])
def test_16_bit_keeps_the_high_byte(kind: str) -> None:
    contract = Preprocess(size=(64, 64))
    eight = picture(97, 61, 1)[..., 0]
    sixteen = eight.astype(np.uint16) * 256 + 255
    image = Image.fromarray(sixteen)
    if kind == "I":
        image = Image.fromarray(sixteen.astype(np.int32))
    elif kind == "png":
        file = io.BytesIO()
        image.save(file, "PNG")
        image = Image.open(file)
    assert image.mode.startswith("I")
    assert_same(contract(image), reference(Image.fromarray(eight), contract))


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(PocketclipError, match="no known range"):
        Preprocess(size=(8, 8))(Image.new("F", (8, 8)))


def test_the_source_image_is_left_alone() -> None:
    image = Image.fromarray(picture(20, 30, 4), "RGBA")
    before = image.tobytes()
    Preprocess(size=(8, 8))(image)
    assert image.mode == "RGBA" and image.tobytes() == before


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_bundle_entry_reads_back(mode: Any) -> None:
    padding = (1, 2, 3) if mode == "longest" else (0, 0, 0)
    contract = Preprocess(
        size=(48, 64), resize_mode=mode, mean=(0.1, 0.2, 0.3), background=(9, 8, 7), padding=padding
    )
    assert Preprocess.from_bundle(contract.bundle()) == contract


def test_bundle_entry_of_another_kind_is_refused() -> None:
    entry = Preprocess(size=(8, 8)).bundle()
    with pytest.raises(PocketclipError, match=r"color = 'BGR' .only 'RGB'"):
        Preprocess.from_bundle({**entry, "color": "BGR"})
    with pytest.raises(PocketclipError, match="lacks 'mean'"):
        Preprocess.from_bundle({k: v for k, v in entry.items() if k != "mean"})
    with pytest.raises(PocketclipError, match="interpolation"):
        Preprocess.from_bundle({**entry, "resize": {**entry["resize"], "interpolation": "area"}})


@pytest.mark.parametrize(
    "wrong", [{"size": (0, 8)}, {"std": (1, 0, 1)}, {"background": (256, 0, 0)}, {"crop": "center"}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preprocess(**{"size": (8, 8), **wrong})
