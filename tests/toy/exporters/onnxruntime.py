"""Writes one small file; stands in for the exporter of the same name."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from compress import atomic
from compress.clip import Clip

REQUIRES = ""
VERSION = 1


class Config(BaseModel):
    """Settings of the toy export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "int8"] = "fp32"
    """Name of the number format."""


def write(clip: Clip, cfg: Config, out: Path) -> None:
    with atomic.folder(out) as folder:
        (folder / "scale.txt").write_text(f"{cfg.precision} {clip.model.logit_scale.item():.4f}")
