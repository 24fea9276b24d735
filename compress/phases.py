"""Training at low resolution or with dropped patches first, which is several times cheaper."""

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from compress.errors import PocketclipError
from compress.structure import UpstreamVision, VisionConfig


class Phase(BaseModel):
    """A part of the training (RECLIP trains small images first, FLIP drops patches)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    until: float = Field(gt=0, le=1)
    """Share of the steps at which this phase ends."""
    image_size: int = Field(ge=8)
    """Side of the training images, pixels; a multiple of the patch size."""
    keep: float = Field(default=1.0, gt=0, le=1)
    """Share of the patches the image tower sees, drawn anew for each image."""


def phase_at(phases: Sequence[Phase], done: float, vision: VisionConfig | UpstreamVision) -> Phase:
    """The phase when the share `done` of the steps is over; after the last one, the full size."""
    full = Phase(until=1.0, image_size=vision.image_size)
    return next((phase for phase in phases if done < phase.until), full)


def kept_patches(
    phase: Phase, num: int, vision: VisionConfig | UpstreamVision, generator: Generator
) -> Tensor | None:
    """Random patches to keep of each image -> indices [num, M], or None where all are kept."""
    if phase.keep == 1:
        return None
    assert isinstance(vision, VisionConfig), "check_phases lets no other tower through"
    patches = (phase.image_size // vision.patch_size) ** 2
    order = torch.rand(num, patches, generator=generator).argsort(dim=1)
    return order[:, : max(1, round(patches * phase.keep))]


def check_phases(
    phases: Sequence[Phase], vision: VisionConfig | UpstreamVision, place: str
) -> None:
    """Refuse a resolution that the patches do not divide; `place` is the stage's name."""
    if isinstance(vision, UpstreamVision):
        if phases:
            raise PocketclipError(f"{place}.phases needs a ViT image tower; this is {vision.name}")
        return
    for n, phase in enumerate(phases):
        if phase.image_size % vision.patch_size:
            raise PocketclipError(
                f"{place}.phases[{n}].image_size: {phase.image_size} is no multiple of the patch "
                f"size {vision.patch_size}"
            )
