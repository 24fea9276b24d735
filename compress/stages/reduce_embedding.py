"""Fewer embedding dimensions: both towers' projections are cut or rotated, so every index shrinks.

`pca` keeps the directions in which training embeddings vary most; `truncate` the first dimensions,
which suits a model distilled with `matryoshka`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress import calibrate
from compress.clip import build
from compress.errors import PocketclipError
from compress.model import ClipModel
from compress.nn import vectors
from compress.structure import require_float
from compress.work import Work

VERSION = 1


class Config(BaseModel):
    """Settings of the reduce_embedding stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dim: int = Field(ge=1)
    """Embedding width that is kept."""
    method: Literal["pca", "truncate"] = "pca"
    """pca: directions of training embeddings. truncate: the first dimensions."""
    num_images: int = Field(default=512, ge=2)
    """Training pairs that pca sees."""


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Cut `work.clip`'s embedding to `dim` dimensions."""
    model = work.clip.model
    require_float(model.config, "reduce_embedding")
    width = model.config.embed_dim
    if cfg.dim > width:
        raise PocketclipError(f"reduce_embedding.dim: {cfg.dim} is more than the model's {width}")
    directions = torch.eye(width)[:, : cfg.dim]
    if cfg.method == "pca":
        pairs = calibrate.draw(work.clip, work.data, cfg.num_images, work.seed)
        with torch.no_grad():
            directions = vectors.pca(*calibrate.embed(model, pairs), cfg.dim)
    step = {"step": "reduce_embedding", "settings": cfg.model_dump(mode="json")}
    return replace(work, clip=work.clip.with_model(rotated(model, directions), step))


def rotated(model: ClipModel, directions: Tensor) -> ClipModel:
    """The model whose embeddings are those of `model` times directions [E, K]."""
    config = model.config.model_copy(update={"embed_dim": directions.shape[1]})
    state = dict(model.state_dict())
    for tower in ("image", "text"):
        name = f"{tower}.projection.weight"
        state[name] = directions.T @ state[name]
    return build(config, state, "reduce_embedding")
