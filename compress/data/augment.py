"""Image augmentation whose parameters are drawn first and applied later, so a store can replay it.

Shapes: B batch, S stored side, T side asked for, P parameters. Everything is batched tensor work:
a step's augmentation costs a few milliseconds, where a PIL pipeline would starve a small model.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Generator, Tensor

from compress.preprocess import Preprocess

ELASTIC_GRID = 5  # control points along one side of the elastic warp
COLUMNS = {
    "angle": 1, "scale": 1, "aspect": 1, "shear": 1, "shift": 2,
    "elastic": 2 * ELASTIC_GRID**2, "background": 3, "hue": 1, "saturation": 1, "contrast": 1,
    "brightness": 1, "blur": 1, "edges": 1, "erase": 4,
}  # fmt: skip
TO_YIQ = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
NUM_PARAMETERS = sum(COLUMNS.values())


class Augment(BaseModel):
    """How strongly training images vary; 0 switches a part off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rotate: float = 12.0
    """Largest rotation, degrees."""
    scale: float = 0.25
    """Largest relative change of size, fraction."""
    aspect: float = 0.15
    """Largest relative change of width against height, fraction."""
    shear: float = 0.1
    """Largest shear, fraction of the height."""
    shift: float = 0.1
    """Largest shift, fraction of the side."""
    elastic: float = 0.05
    """Standard deviation of the elastic warp's control points, fraction of the side."""
    coloured_background: float = 0.5
    """Share of images with a random background where they are transparent."""
    hue: float = 0.08
    """Standard deviation of the hue rotation, turns."""
    grey: float = 0.1
    """Share of images without colour."""
    saturation: float = 0.5
    """Standard deviation of log saturation."""
    contrast: float = 0.3
    """Standard deviation of log contrast."""
    brightness: float = 0.1
    """Standard deviation of the added brightness, fraction of the range."""
    blur: float = 0.2
    """Share of images that are blurred."""
    edges: float = 0.2
    """Share of images whose outlines are darkened or kept alone."""
    erase: float = 0.25
    """Share of images with one erased box."""

    def draw(self, num: int, generator: Generator) -> Tensor:
        """Parameters of `num` augmentations -> [num, P] float32, in the order of COLUMNS."""

        def normal(width: int) -> Tensor:
            return torch.randn(num, width, generator=generator)

        def uniform(width: int) -> Tensor:
            return torch.rand(num, width, generator=generator)

        def spread(width: int, limit: float) -> Tensor:
            return (uniform(width) * 2 - 1) * limit

        def sometimes(share: float) -> Tensor:
            return (uniform(1) < share).float()

        saturation = torch.exp(normal(1) * self.saturation) * (1 - sometimes(self.grey))
        coloured = sometimes(self.coloured_background)
        edges = sometimes(self.edges) * uniform(1)
        box = torch.cat([uniform(2), 0.15 + 0.3 * uniform(2)], dim=1) * sometimes(self.erase)
        parts = {
            "angle": spread(1, math.radians(self.rotate)),
            "scale": torch.exp(spread(1, self.scale)),
            "aspect": torch.exp(spread(1, self.aspect)),
            "shear": spread(1, self.shear),
            "shift": spread(2, self.shift),
            "elastic": normal(2 * ELASTIC_GRID**2) * self.elastic * uniform(1),
            "background": 1 - uniform(3) * coloured,
            "hue": normal(1) * self.hue,
            "saturation": saturation,
            "contrast": torch.exp(normal(1) * self.contrast),
            "brightness": normal(1) * self.brightness,
            "blur": sometimes(self.blur) * uniform(1),
            "edges": edges,
            "erase": box,
        }
        return torch.cat([parts[name] for name in COLUMNS], dim=1)


def replay(images: Tensor, parameters: Tensor, size: int, preprocess: Preprocess) -> Tensor:
    """Apply drawn parameters.

    images [B, 4, S, S] uint8 with straight alpha, parameters [B, P] -> pixels [B, 3, T, T] float32,
    T = size, normalised with the contract's mean and std.
    """
    names = list(COLUMNS)
    p = dict(zip(names, parameters.split(list(COLUMNS.values()), dim=1), strict=True))
    x = images.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], dim=1)  # premultiplied, so edges do not bleed
    x = F.grid_sample(x, _grid(p, images.shape[-1]), align_corners=False, padding_mode="zeros")
    rgb = x[:, :3] + (1 - x[:, 3:]) * p["background"][:, :, None, None]
    rgb = _blurred(rgb, p["blur"])
    rgb = _outlined(rgb, p["edges"])
    rgb = _recoloured(rgb, p).clamp(0, 1)
    rgb = _erased(rgb, p["erase"])
    if size != rgb.shape[-1]:
        rgb = F.interpolate(rgb, (size, size), mode="bilinear", antialias=True)
    return _normalised(rgb, preprocess)


def plain(images: Tensor, size: int, preprocess: Preprocess) -> Tensor:
    """The same without augmentation: white where transparent. Shapes as in `replay`."""
    x = images.float() / 255
    background = torch.tensor(preprocess.background, device=x.device).view(1, 3, 1, 1) / 255
    rgb = x[:, :3] * x[:, 3:] + (1 - x[:, 3:]) * background
    if size != rgb.shape[-1]:
        rgb = F.interpolate(rgb, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return _normalised(rgb, preprocess)


def _normalised(rgb: Tensor, preprocess: Preprocess) -> Tensor:
    mean = torch.tensor(preprocess.mean, device=rgb.device).view(1, 3, 1, 1)
    return (rgb - mean) / torch.tensor(preprocess.std, device=rgb.device).view(1, 3, 1, 1)


def _grid(p: dict[str, Tensor], side: int) -> Tensor:
    """Sampling positions [B, S, S, 2]: the affine map plus a smooth random warp."""
    cos, sin = torch.cos(p["angle"]), torch.sin(p["angle"])
    wide, high = p["scale"] * p["aspect"].sqrt(), p["scale"] / p["aspect"].sqrt()
    row_x = torch.cat([cos / wide, (p["shear"] * cos - sin) / high, 2 * p["shift"][:, :1]], dim=1)
    row_y = torch.cat([sin / wide, (p["shear"] * sin + cos) / high, 2 * p["shift"][:, 1:]], dim=1)
    theta = torch.stack([row_x, row_y], dim=1)  # [B, 2, 3]
    grid = F.affine_grid(theta, [len(theta), 1, side, side], align_corners=False)
    warp = p["elastic"].view(-1, 2, ELASTIC_GRID, ELASTIC_GRID) * 2
    warp = F.interpolate(warp, (side, side), mode="bicubic", align_corners=True)
    return grid + warp.permute(0, 2, 3, 1)


def _blurred(rgb: Tensor, amount: Tensor) -> Tensor:
    """Mix with a twice box-blurred copy; amount [B, 1] in 0-1, 0 leaves an image as it is."""
    rows = amount.flatten().nonzero().flatten()
    sharp = rgb[rows]
    soft = F.avg_pool2d(F.pad(sharp, (2, 2, 2, 2), mode="replicate"), 3, stride=1)
    soft = F.avg_pool2d(soft, 3, stride=1)
    return rgb.index_copy(0, rows, sharp + amount[rows, :, None, None] * (soft - sharp))


def _outlined(rgb: Tensor, amount: Tensor) -> Tensor:
    """Darken outlines, and towards amount 1 fade the fill to a drawing; amount [B, 1] in 0-1, 0
    leaves an image as it is.
    """
    rows = amount.flatten().nonzero().flatten()
    drawn = rgb[rows]
    grey = drawn.mean(dim=1, keepdim=True)
    around = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    high, low = F.max_pool2d(around, 3, stride=1), -F.max_pool2d(-around, 3, stride=1)
    ink = ((high - low) * 2).clamp(0, 1)  # [rows, 1, S, S]
    strength = amount[rows, :, None, None]
    fade = (strength - 0.5).clamp(min=0) * 2
    faded = drawn + fade * (1 - drawn)
    return rgb.index_copy(0, rows, faded * (1 - strength.sqrt() * ink))


def _recoloured(rgb: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Hue rotation and saturation in YIQ, then contrast and brightness."""
    angle = 2 * math.pi * p["hue"]
    cos, sin = torch.cos(angle) * p["saturation"], torch.sin(angle) * p["saturation"]
    to_yiq = torch.tensor(TO_YIQ, device=rgb.device)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.cat([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq  # [B, 3, 3]
    rgb = (matrix @ rgb.flatten(2)).view_as(rgb)
    middle = rgb.mean(dim=(1, 2, 3), keepdim=True)
    return (
        (rgb - middle) * p["contrast"][:, :, None, None] + middle + p["brightness"][..., None, None]
    )


def _erased(rgb: Tensor, box: Tensor) -> Tensor:
    """Fill one box per image with its mean colour; box [B, 4] = x, y, width, height in 0-1."""
    side = torch.linspace(0, 1, rgb.shape[-1], device=rgb.device)
    x, y, wide, high = (column[:, None] for column in box.unbind(dim=1))
    inside_x = (side >= x) & (side < x + wide)  # [B, S]
    inside_y = (side >= y) & (side < y + high)
    inside = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]  # [B, 1, S, S]
    return torch.where(inside, rgb.mean(dim=(2, 3), keepdim=True), rgb)
