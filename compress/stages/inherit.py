"""Manual weight inheritance (TinyCLIP): a smaller student starts as a slice of its teacher."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.calibrate import draw
from compress.clip import Clip, build
from compress.errors import PocketclipError
from compress.layers import resized_positions
from compress.model import ClipModel, ImageTower, TextTower
from compress.nn.slim import front_layers, leading, leading_heads, uniform_layers
from compress.principal import fit_tower_
from compress.structure import (
    ClipConfig,
    TextConfig,
    TowerConfig,
    UpstreamText,
    UpstreamVision,
    VisionConfig,
    plain_text,
    plain_vision,
    require_float,
)
from compress.train import keep_freed_memory
from compress.work import Work

VERSION = 1


class Shape(BaseModel):
    """The student's shape of one tower; what is left out stays as in the teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int | None = Field(default=None, ge=1)
    """Residual stream width."""
    layers: int | None = Field(default=None, ge=1)
    """Number of transformer blocks."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads of each block, kept whole; default: in proportion to the width."""
    mlp_ratio: float | None = Field(default=None, gt=0)
    """Hidden width of the MLP over the width; default: the teacher's ratio."""


class VisionShape(Shape):
    """The student's shape of the image tower."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of its pictures in pixels, a multiple of the patch size, at most the teacher's: fewer
    patches of the same kind, position embeddings interpolated. Preprocessing follows."""


class Config(BaseModel):
    """Settings of the inherit stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vision: VisionShape = VisionShape()
    """The student's image tower."""
    text: Shape = Shape()
    """The student's text tower."""
    layer_rule: Literal["uniform", "front"] = "uniform"
    """Which layers are kept: evenly spread with the first and the last, or TinyCLIP's stride from
    the front (which drops the last ones)."""
    weights: Literal["leading", "principal"] = "leading"
    """leading: the first channels and heads of each tensor, as TinyCLIP does. principal: the
    principal directions of the activations, and matrices fitted to the teacher's by least squares
    (our formulation, `compress/principal.py`); needs training data."""
    num_samples: int = Field(default=2048, ge=1)
    """Training pairs that `weights: principal` looks at."""


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Cut `work.clip` to the shape asked for; the embedding width stays the teacher's."""
    source = work.clip.model
    require_float(source.config, "inherit")
    config = shape(source.config, cfg)
    step = {"step": "inherit", "settings": cfg.model_dump(mode="json")}
    student = inherit(source, config, cfg.layer_rule)
    if cfg.weights == "principal":
        fit_(student, work, cfg)
    clip = work.clip.with_model(student, step)
    if cfg.vision.image_size is not None:
        size = (cfg.vision.image_size, cfg.vision.image_size)
        clip = replace(clip, preprocess=clip.preprocess.model_copy(update={"size": size}))
    return replace(work, clip=clip)


def fit_(student: ClipModel, work: Work, cfg: Config) -> None:
    """Replace the slices in those towers that became smaller by weights fitted to activations."""
    source = work.clip.model
    if cfg.vision.image_size not in (None, work.clip.preprocess.size[0]):
        raise PocketclipError(
            "inherit.weights: principal fits token by token and cannot change vision.image_size; "
            "use leading, or two inherit stages"
        )
    keep_freed_memory()  # every layer's activations come and go
    seen = draw(work.clip, work.data, cfg.num_samples, work.seed)
    for new, old, inputs in (
        (student.image, source.image, seen.pixels),
        (student.text, source.text, _shortest(torch.cat([seen.tokens, seen.more_tokens]), source)),
    ):
        if isinstance(new, ImageTower | TextTower) and new.config != old.config:
            assert isinstance(old, ImageTower | TextTower)
            fit_tower_(new, old, _layers(old.config, new.config, cfg.layer_rule), inputs)


def _shortest(tokens: Tensor, source: ClipModel) -> Tensor:
    """Texts cut after the longest, where nothing behind the end of a text is seen."""
    text = source.config.text
    if not (isinstance(text, TextConfig) and text.sees_no_padding):
        return tokens
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def refuses(clip: Clip) -> str | None:
    """Why nothing of a model can be cut; a tower of another library stays whole."""
    vision, text = clip.model.config.vision, clip.model.config.text
    if isinstance(vision, UpstreamVision) and isinstance(text, UpstreamText):
        return f"inherit needs a tower of ours; these are {vision.name} and {text.name}"
    return None


def shape(config: ClipConfig, cfg: Config) -> ClipConfig:
    """The student's structure; `pocketclip plan` asks for it too, before anything has run."""
    towers = {"vision": _vision(config, cfg), "text": _text(config, cfg)}
    return ClipConfig.model_validate({**dict(config), **towers})


def _vision(config: ClipConfig, cfg: Config) -> VisionConfig | UpstreamVision:
    """A tower of another library stays whole, if nothing smaller is asked for."""
    if isinstance(config.vision, UpstreamVision) and cfg.vision == VisionShape():
        return config.vision
    plain = plain_vision(config, "inherit.vision")
    side = cfg.vision.image_size or plain.image_size
    if side > plain.image_size or side % plain.patch_size:
        raise PocketclipError(
            f"inherit.vision.image_size: {side} must be a multiple of the patch size "
            f"{plain.patch_size} and at most the teacher's {plain.image_size}"
        )
    smaller = _smaller("vision", plain, cfg.vision)
    return VisionConfig.model_validate({**smaller, "image_size": side})


def _text(config: ClipConfig, cfg: Config) -> TextConfig | UpstreamText:
    if isinstance(config.text, UpstreamText) and cfg.text == Shape():
        return config.text
    plain = plain_text(config, "inherit.text")
    return TextConfig.model_validate(_smaller("text", plain, cfg.text))


def inherit(source: ClipModel, config: ClipConfig, layer_rule: str = "uniform") -> ClipModel:
    """A model of shape `config` whose every tensor is a slice of the source's."""
    state = source.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in ClipModel(config).state_dict().items()}
    layers, head_width = {}, {}
    for tower, old, new in (
        ("image", source.config.vision, config.vision),
        ("text", source.config.text, config.text),
    ):
        if isinstance(old, TowerConfig) and isinstance(new, TowerConfig):
            layers[tower] = _layers(old, new, layer_rule)
            head_width[tower] = new.head_width
    values = {}
    for name, shape in wanted.items():
        tower = name.split(".")[0]
        origin = state.get(_origin(name, layers.get(tower, [])))
        if origin is None:  # what had no projection starts with one that changes nothing
            origin = torch.eye(source.config.embed_dim)
        if name == "image.position" and len(origin) != shape[0]:
            assert isinstance(source.config.vision, VisionConfig)
            first = int(source.config.vision.class_token)
            origin = resized_positions(origin, first, math.isqrt(shape[0] - first))
        values[name] = _cut(name, origin, shape, head_width.get(tower, 1))
    return build(config, values, "inherit")


def _cut(name: str, origin: Tensor, shape: tuple[int, ...], head_width: int) -> Tensor:
    if ".qkv." in name:
        heads = shape[0] // (3 * head_width)
        return leading_heads(origin, head_width, heads, shape[1] if len(shape) > 1 else None)
    return leading(origin, shape)


def _origin(name: str, layers: list[int]) -> str:
    """The teacher's name of a tensor: block n of the student comes from block layers[n]."""
    parts = name.split(".")
    if len(parts) > 2 and parts[1] == "blocks":
        parts[2] = str(layers[int(parts[2])])
    return ".".join(parts)


def _layers(teacher: TowerConfig, student: TowerConfig, rule: str) -> list[int]:
    choose = uniform_layers if rule == "uniform" else front_layers
    return choose(teacher.num_layers, student.num_layers)


def _smaller(tower: str, teacher: TowerConfig, shape: Shape) -> dict[str, object]:
    """The teacher's tower config with the student's sizes; every excess is named."""
    width = shape.width or teacher.width
    layers = shape.layers or teacher.num_layers
    heads = shape.heads or max(1, min(teacher.heads) * width // teacher.width)
    ratio = shape.mlp_ratio or min(teacher.mlp_width) / teacher.width
    mlp_width = round(width * ratio)
    for name, value, limit in (
        ("width", width, teacher.width),
        ("layers", layers, teacher.num_layers),
        ("heads", heads, min(teacher.heads)),
        ("mlp_ratio (as width)", mlp_width, min(teacher.mlp_width)),
    ):
        if value > limit:
            raise PocketclipError(
                f"inherit.{tower}.{name}: {value} is more than the teacher's {limit}; "
                "a student inherits a slice of its teacher"
            )
    sizes: dict[str, object] = {
        "width": width,
        "heads": (heads,) * layers,
        "mlp_width": (mlp_width,) * layers,
    }
    if teacher.projection == "none" and width != teacher.width:
        sizes["projection"] = "linear"
    return {**teacher.model_dump(), **sizes}
