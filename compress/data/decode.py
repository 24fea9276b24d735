"""Encoded image bytes in, RGBA images with straight alpha out."""

import io
import zlib

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises on damaged files of the formats that shards hold.
DAMAGED = (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError)


def decode(content: bytes) -> Image.Image:
    """Any mode Pillow reads (grey, palette, CMYK, 16-bit) -> upright RGBA.

    Raises one of DAMAGED where `content` is not a whole image.
    """
    image: Image.Image = Image.open(io.BytesIO(content))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 instead of scaling it.
        high_byte = np.asarray(image, np.uint32) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    if image.mode == "CMYK":
        image = image.convert("RGB")
    return image.convert("RGBA")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shortest side to `size` pixels and crops the centre."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
