"""Manual weight inheritance (TinyCLIP): a smaller student starts as a slice of its teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.clip import build
from compress.errors import PocketclipError
from compress.model import ClipConfig, ClipModel, TextConfig, TowerConfig, VisionConfig
from compress.nn.slim import front_layers, leading, leading_heads, uniform_layers
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


class Config(BaseModel):
    """Settings of the inherit stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vision: Shape = Shape()
    """The student's image tower."""
    text: Shape = Shape()
    """The student's text tower."""
    layer_rule: Literal["uniform", "front"] = "uniform"
    """Which layers are kept: evenly spread with the first and the last, or TinyCLIP's stride from
    the front (which drops the last ones)."""


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Cut `work.clip` to the shape asked for; the embedding width stays the teacher's."""
    source = work.clip.model
    config = shape(source.config, cfg)
    step = {"step": "inherit", "settings": cfg.model_dump(mode="json")}
    return replace(work, clip=work.clip.with_model(inherit(source, config, cfg.layer_rule), step))


def shape(config: ClipConfig, cfg: Config) -> ClipConfig:
    """The student's structure; `pocketclip plan` asks for it too, before anything has run."""
    return ClipConfig(
        embed_dim=config.embed_dim,
        vision=VisionConfig.model_validate(_smaller("vision", config.vision, cfg.vision)),
        text=TextConfig.model_validate(_smaller("text", config.text, cfg.text)),
        logit_bias=config.logit_bias,
    )


def inherit(source: ClipModel, config: ClipConfig, layer_rule: str = "uniform") -> ClipModel:
    """A model of shape `config` whose every tensor is a slice of the source's."""
    state = source.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in ClipModel(config).state_dict().items()}
    layers = {
        "image": _layers(source.config.vision, config.vision, layer_rule),
        "text": _layers(source.config.text, config.text, layer_rule),
    }
    head_width = {"image": config.vision.head_width, "text": config.text.head_width}
    values = {}
    for name, shape in wanted.items():
        tower = name.split(".")[0]
        origin = state[_origin(name, layers.get(tower, []))]
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
    sizes = {"width": width, "heads": (heads,) * layers, "mlp_width": (mlp_width,) * layers}
    return {**teacher.model_dump(), **sizes}
