"""Counts steps with a checkpoint after each, and can be killed in the middle, once."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from compress import atomic
from compress.work import Work

VERSION = 1


class Config(BaseModel):
    """Settings of the count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 5
    """Steps to count."""
    kill_at: int | None = None
    """The process kills itself before this step, unless it starts from a checkpoint."""
    seconds: float = 0.0
    """Pause before each step, seconds."""
    fill_disk: bool = False
    """Whether to end as a write to a full disk does."""


def run(work: Work, cfg: Config, out: Path) -> Work:
    checkpoint = out / "checkpoint.txt"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, cfg.steps):
        if step == cfg.kill_at and first == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(cfg.seconds)
        atomic.write_text(checkpoint, str(step + 1))
        with (out / "log.txt").open("a") as log:
            log.write(f"{step}\n")
    if cfg.fill_disk:
        Path("/dev/full").write_text("x")
    return replace(work, clip=work.clip.with_model(work.clip.model, {"step": "count"}))
