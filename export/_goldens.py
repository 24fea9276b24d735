"""Awkward pictures and texts, the same on every machine: what a bundle's goldens are made of."""

import numpy as np
from PIL import Image, ImageDraw

# Empty, over-long, accents, Chinese, emoji, and case and white space that clean-up must undo.
TEXTS = (
    "a photo of a red apple",
    "",
    "many small birds over a grey sea at dawn, " * 40,
    "crème brûlée à la façon d'une naïve garçonne",
    "一只猫坐在红色的垫子上",
    "👩‍🚀 🚀 ❤️‍🔥",
    "  A   Photo\tof\n THREE Dogs ",
)

COLORS = ("black", "white", "red", "green", "blue", "yellow", "orange", "purple", "pink", "brown")
THINGS = ("apple", "dog", "car", "house", "star", "face", "tree", "clock", "boat")


def pictures(size: tuple[int, int]) -> dict[str, Image.Image]:
    """File name -> picture, for a model input of `size` (height, width).

    Wide and tall RGB, 8-bit grey, grey and RGB with straight alpha, 16-bit grey, and one picture
    smaller than the input, which has to grow.
    """
    height, width = size
    wide, tall = (
        (round(2.3 * width), round(1.4 * height)),
        (round(1.2 * width), round(2.1 * height)),
    )
    depth = np.linspace(0, 65535, tall[0] * tall[1]).reshape(tall[1], tall[0])
    return {
        "wide.png": drawing(1, wide),
        "tall.png": drawing(2, tall),
        "grey.png": drawing(3, wide).convert("L"),
        "grey-alpha.png": _faded(drawing(4, tall)).convert("LA"),
        "alpha.png": _faded(drawing(5, wide)),
        "deep.png": Image.fromarray(depth.astype(np.uint16)),
        "small.png": drawing(6, (max(2, width // 3), max(2, height // 2))),
    }


def drawing(seed: int, size: tuple[int, int]) -> Image.Image:
    """RGB picture of `size` (width, height): coloured shapes on a plain ground."""
    random = np.random.default_rng(seed)
    ground = tuple(int(v) for v in random.integers(0, 256, 3))
    image = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = (int(random.integers(-extent // 4, extent)) for extent in size)
        box = (left, top, left + int(random.integers(2, size[0])), top + int(size[1] * 0.6))
        color = tuple(int(v) for v in random.integers(0, 256, 3))
        (draw.ellipse if random.random() < 0.6 else draw.rectangle)(box, fill=color)
    return image


def captions() -> list[str]:
    """90 plain captions, for the checks that need more texts than the goldens."""
    return [f"a photo of a {color} {thing}" for color in COLORS for thing in THINGS]


def _faded(image: Image.Image) -> Image.Image:
    """RGBA: opaque at the left, transparent at the right."""
    ramp = np.linspace(255, 0, image.width).astype(np.uint8)
    alpha = Image.fromarray(np.tile(ramp, (image.height, 1)))
    faded = image.convert("RGBA")
    faded.putalpha(alpha)
    return faded
