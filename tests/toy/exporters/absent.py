"""A runtime that is not here."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from compress.clip import Clip
from export import Unavailable

REQUIRES = "absent"
VERSION = 1


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def write(clip: Clip, cfg: Config, out: Path) -> None:
    raise Unavailable("needs a machine from the future")
