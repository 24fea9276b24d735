"""Adds a number to the logit scale; says nothing of training."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from compress.work import Work

VERSION = 1


class Config(BaseModel):
    """Settings of the nudge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: float = 0.5
    """Added to the logit scale, in log units."""
    noise: float = 0.0
    """Scale of a random number added as well."""
    words: Path | None = None
    """A file beside the recipe; its length is added too."""


def run(work: Work, cfg: Config, out: Path) -> Work:
    model = copy.deepcopy(work.clip.model)
    with torch.no_grad():
        model.logit_scale += cfg.amount + cfg.noise * torch.rand(())
    return replace(work, clip=work.clip.with_model(model, {"step": "nudge"}))
