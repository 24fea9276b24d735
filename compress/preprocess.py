"""From a picture as it comes (any mode, size, orientation) to the pixels a model was trained on.

Follows open_clip's evaluation transform to the bit for RGB and grey pictures. Three things are
decided before the resize, so that code in any language can repeat them from `bundle.json`:
transparency is blended over `background` (open_clip drops it and shows whatever colour lies
beneath), 16-bit values keep their high byte (open_clip clips them to white), and palette and CMYK
become RGB first (open_clip resizes palette indices by nearest neighbour, and CMYK ink by ink).
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from compress.errors import PocketclipError

Color = tuple[int, int, int]
Channels = tuple[float, float, float]

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# What `Preprocess` always does; a bundle that says otherwise cannot be read.
FIXED = {
    "color": "RGB",
    "exif_orientation": True,
    "rescale": 1 / 255,
    "layout": "NCHW",
}


class Preprocess(BaseModel):
    """The preprocessing contract of an image tower; calling it runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[int, int]
    """Height and width of the model's input in pixels."""
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"
    """shortest: the shortest side to size, then a centre crop; squash: both sides, the aspect is
    lost; longest: the whole picture inside, then padding."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    """Resampling filter; always with antialiasing when the picture shrinks."""
    mean: Channels = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from R, G, B after scaling to 0..1; OpenAI's values unless told."""
    std: Channels = (0.26862954, 0.26130258, 0.27577711)
    """Divides R, G, B after the mean is subtracted."""
    background: Color = (255, 255, 255)
    """8-bit colour under transparent pixels."""
    padding: Color = (0, 0, 0)
    """8-bit colour around the picture, for resize_mode longest."""

    @model_validator(mode="after")
    def _possible(self) -> "Preprocess":
        if min(self.size) < 1:
            raise ValueError(f"size {self.size} needs a height and width of at least 1")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above 0 in every channel")
        if not all(0 <= value <= 255 for value in (*self.background, *self.padding)):
            raise ValueError("background and padding are 8-bit colours, 0 to 255")
        return self

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode and size -> float32 [3, H, W], normalised.

        Raises PocketclipError for floating-point pictures, whose range nobody knows.
        """
        picture = self.resize(flatten(image, self.background))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # [3, H, W]
        scaled = pixels.to(torch.float32).div(255)
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (self.mean, self.std))
        return scaled.sub(mean).div(std)

    def resize(self, image: Image.Image) -> Image.Image:
        """RGB image -> RGB image of `size`, as `resize_mode` says."""
        height, width = self.size
        resample = FILTERS[self.interpolation]
        if self.resize_mode == "squash":
            return image.resize((width, height), resample)
        if self.resize_mode == "longest":
            ratio = max(image.height / height, image.width / width)
            fitted = (max(1, round(image.width / ratio)), max(1, round(image.height / ratio)))
            image = image.resize(fitted, resample)
            return _pad(image, self.size, self.padding)
        return _crop(image.resize(_shortest(image.size, self.size), resample), self.size)

    def bundle(self) -> dict[str, Any]:
        """The `preprocess` entry of a bundle.json."""
        resize: dict[str, Any] = {
            "mode": self.resize_mode,
            "size": list(self.size),
            "interpolation": self.interpolation,
            "antialias": True,
        }
        if self.resize_mode == "longest":
            resize["background"] = list(self.padding)
        return {
            **FIXED,
            "alpha": {"mode": "blend", "background": list(self.background)},
            "resize": resize,
            "crop": "center" if self.resize_mode == "shortest" else None,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_bundle(cls, entry: Mapping[str, Any]) -> "Preprocess":
        """The contract that a bundle.json's `preprocess` entry states.

        Raises PocketclipError where the entry asks for what this code doesn't do.
        """
        try:
            odd = [f"{k} = {entry[k]!r} (only {v!r})" for k, v in FIXED.items() if entry[k] != v]
            if entry["alpha"]["mode"] != "blend":
                odd.append(f"alpha.mode = {entry['alpha']['mode']!r} (only 'blend')")
            if odd:
                raise PocketclipError("bundle preprocess not supported: " + ", ".join(odd))
            return cls(
                size=entry["resize"]["size"],
                resize_mode=entry["resize"]["mode"],
                interpolation=entry["resize"]["interpolation"],
                mean=entry["mean"],
                std=entry["std"],
                background=entry["alpha"]["background"],
                padding=entry["resize"].get("background", (0, 0, 0)),
            )
        except KeyError as error:
            raise PocketclipError(f"bundle preprocess lacks {error}") from None
        except ValidationError as error:
            raise PocketclipError(f"bundle preprocess not supported: {error}") from None


def flatten(image: Image.Image, background: Color) -> Image.Image:
    """Any PIL image -> upright opaque 8-bit RGB; transparency shows `background`."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise PocketclipError("floating-point pictures have no known range: convert to 8-bit first")
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        under = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(under, image)
    return image.convert("RGB")


def _shortest(source: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the source scaled to just cover `size` (height, width)."""
    (width, height), (to_height, to_width) = source, size
    if to_height != to_width:
        ratio = min(height / to_height, width / to_width)
        return round(width / ratio), round(height / ratio)
    if width <= height:
        return to_width, int(to_width * height / width)
    return int(to_height * width / height), to_height


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre of `size` (height, width); a half pixel rounds to even, as torchvision's."""
    height, width = size
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, size: tuple[int, int], color: Color) -> Image.Image:
    """The image in the middle of `size` (height, width); an odd pixel goes right and below."""
    height, width = size
    canvas = Image.new("RGB", (width, height), color)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
