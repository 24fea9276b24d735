"""Photo augmentation whose parameters are drawn first and replayed later, in DataCompDR's encoding.

One augmentation is `[[top, left, height, width], [[op, magnitude], [op, magnitude]]]`: a random
resized crop in pixels of the source image, then RandAugment's operations with resolved magnitudes.
Drawing and replay follow torchvision's transforms of these names; pictures are PIL images.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from compress.errors import PocketclipError

Entry = list[Any]

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""By DataCompDR's operation ids."""
SIGNED = range(1, 10)
"""Operations whose magnitude may be negative."""
BINS = 31
CROP_TRIES = 10


class Crops(BaseModel):
    """Random resized crop and RandAugment, DataCompDR's settings by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the picture's area that a crop covers, smallest and largest."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop, smallest and largest."""
    num_operations: int = Field(default=2, ge=0)
    """RandAugment operations for each picture."""
    magnitude: int = Field(default=9, ge=0, lt=BINS)
    """RandAugment's magnitude, of 31 bins."""
    size: int = Field(default=224, ge=8)
    """Side of the crop in which translations are counted, pixels; the teachers' side."""

    def draw(self, width: int, height: int, chance: random.Random) -> Entry:
        """Parameters for a picture of this size."""
        operations = [self._operation(chance) for _ in range(self.num_operations)]
        return [self._crop(width, height, chance), operations]

    def _crop(self, width: int, height: int, chance: random.Random) -> list[int]:
        """torchvision's RandomResizedCrop: some tries, then the largest crop within `ratio`."""
        for _ in range(CROP_TRIES):
            area = width * height * chance.uniform(*self.scale)
            low, high = (math.log(side) for side in self.ratio)
            ratio = math.exp(chance.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return [chance.randint(0, height - h), chance.randint(0, width - w), h, w]
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return [(height - h) // 2, (width - w) // 2, h, w]

    def _operation(self, chance: random.Random) -> list[float]:
        op, share = chance.randrange(len(OPERATIONS)), self.magnitude / (BINS - 1)
        limits = {1: 0.3, 2: 0.3, 3: 150 / 331 * self.size, 4: 150 / 331 * self.size, 5: 30.0}
        limits |= dict.fromkeys((6, 7, 8, 9), 0.9)
        if op == 10:
            return [op, 8 - round(4 * share)]
        if op == 11:
            return [op, 255.0 * (1 - share)]
        value = limits.get(op, 0.0) * share
        return [op, -value if op in SIGNED and chance.random() < 0.5 else value]


def replay(image: Image.Image, entry: Sequence[Any], size: int, interpolation: str) -> Image.Image:
    """Crop, resize to `size` x `size` and apply the operations. RGB image -> RGB image.

    Raises PocketclipError for an entry of another encoding, or a crop outside of the picture: then
    the image is not the one that was reinforced.
    """
    box, operations = _parsed(entry)
    if box is not None:
        top, left, height, width = box
        if top < 0 or left < 0 or top + height > image.height or left + width > image.width:
            raise PocketclipError(
                f"crop {box} lies outside of a picture of {image.width} x {image.height}: it is "
                "not the picture that the teachers saw (join by sha256 to leave such ones out)"
            )
        mode = InterpolationMode(interpolation)
        image = F.resized_crop(image, top, left, height, width, [size, size], mode)
    for op, magnitude in operations:
        image = APPLY[int(op)](image, magnitude)
    return image


def _parsed(entry: Sequence[Any]) -> tuple[list[int] | None, list[tuple[float, float]]]:
    """Box and operations; either may be missing (None, or left out)."""
    box: list[int] | None = None
    operations: list[tuple[float, float]] = []
    for item in entry:
        if item is None:
            continue
        if len(item) == 4 and not isinstance(item[0], list | tuple):
            box = [int(value) for value in item]
        elif all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in item):
            operations = [(pair[0], pair[1] or 0.0) for pair in item]
        else:
            raise PocketclipError(f"param_aug entry {entry}: {item} is no crop and no operations")
    unknown = [op for op, _ in operations if int(op) not in APPLY]
    if unknown:
        raise PocketclipError(f"param_aug entry {entry}: unknown operation {unknown[0]}")
    return box, operations


def _affine(image: Image.Image, translate: Sequence[int], shear: Sequence[float]) -> Image.Image:
    top_left = [0, 0] if any(shear) else None
    return F.affine(
        image, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear), center=top_left
    )


def _degrees(magnitude: float) -> float:
    return math.degrees(math.atan(magnitude))


APPLY: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    0: lambda image, m: image,
    1: lambda image, m: _affine(image, (0, 0), (_degrees(m), 0.0)),
    2: lambda image, m: _affine(image, (0, 0), (0.0, _degrees(m))),
    3: lambda image, m: _affine(image, (int(m), 0), (0.0, 0.0)),
    4: lambda image, m: _affine(image, (0, int(m)), (0.0, 0.0)),
    5: lambda image, m: F.rotate(image, m),
    6: lambda image, m: F.adjust_brightness(image, 1.0 + m),
    7: lambda image, m: F.adjust_saturation(image, 1.0 + m),
    8: lambda image, m: F.adjust_contrast(image, 1.0 + m),
    9: lambda image, m: F.adjust_sharpness(image, 1.0 + m),
    10: lambda image, m: F.posterize(image, int(m)),
    11: lambda image, m: F.solarize(image, m),
    12: lambda image, m: F.autocontrast(image),
    13: lambda image, m: F.equalize(image),
}
