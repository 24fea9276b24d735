"""Automatic weight inheritance (TinyCLIP): masks over a model's width, heads and MLPs, learnt under
one budget for both towers, and the smaller model that is left in the end.

Shapes: D width, H heads, K head width, M MLP width, L tokens. `gates` are mask values in 0-1.

TinyCLIP multiplies the hidden mask into everything that is added to the residual stream. Every
reader of our residual stream is a layer norm, so multiplying there is the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.clip import build
from compress.errors import PocketclipError
from compress.layers import Block
from compress.model import ClipModel, ImageTower, TextTower, plain_image_tower, plain_text_tower
from compress.nn import hard_concrete
from compress.optimizers import Cut, cut
from compress.structure import ClipConfig, TextConfig, TowerConfig, VisionConfig

PLACE = "distill.inherit"


class Inherit(BaseModel):
    """How a student learns which weights to inherit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: float = Field(gt=0, le=1)
    """Share of the prunable parameters of the recipe's model that stay: TinyCLIP's stages end at
    0.75, 0.5 and 0.25. Token embedding and norms are not counted."""
    prune_step: int = Field(ge=1)
    """Step at which masks become a smaller model; TinyCLIP: 3000, 5000, 8000 in stages 1 to 3."""
    ramp_steps: int = Field(default=1000, ge=1)
    """Steps over which the budget falls to `keep`."""
    lr: float = Field(default=0.02, gt=0)
    """Learning rate of masks, and of multipliers upwards."""
    two_sided: bool = False
    """Whether a model smaller than the budget is pulled back too, as in TinyCLIP's paper; its code,
    and the default, only push while the model is too large."""
    multiple_of: int = Field(default=1, ge=1)
    """Width and MLP widths are rounded to multiples of this; 8 suits most devices."""


class TowerMasks(nn.Module):
    """One tower's masks as log alpha, and their gates of this step."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        new: Callable[[int], nn.Parameter] = lambda num: nn.Parameter(  # noqa: E731
            torch.full((num,), hard_concrete.LIMIT)
        )
        self.hidden = new(config.width)
        self.heads = nn.ParameterList(new(heads) for heads in config.heads)
        self.mlp = nn.ParameterList(new(width) for width in config.mlp_width)
        self.head_width = config.head_width
        self.gates: dict[str, Tensor] = {}

    def set_gates(self, choose: Callable[[str, Tensor], Tensor]) -> None:
        """Gates from `choose(name, log alpha)`, names as in named_parameters."""
        self.gates = {name: choose(name, value) for name, value in self.named_parameters()}

    def expected_size(self) -> Tensor:
        """Expected number of prunable parameters (TinyCLIP's count)."""
        hidden = hard_concrete.open_probability(self.hidden).sum()
        per_head = 4 * self.head_width * (1 + 1 / len(self.hidden))
        size = self.hidden.new_zeros(())
        for heads, mlp in zip(self.heads, self.mlp, strict=True):
            size = size + hidden * hard_concrete.open_probability(heads).sum() * per_head
            size = size + 2 * hidden * hard_concrete.open_probability(mlp).sum()
        return size


def prunable_size(config: TowerConfig) -> float:
    """Prunable parameters of a whole tower, counted as `expected_size` counts."""
    attention = 4 * config.head_width * (config.width + 1) * sum(config.heads)
    return attention + 2 * config.width * sum(config.mlp_width)


class Masks(nn.Module):
    """Both towers' masks and the multipliers of their one budget."""

    def __init__(self, config: ClipConfig, cfg: Inherit, whole: ClipConfig) -> None:
        super().__init__()
        self.cfg = cfg
        vision, text = plain_configs(config)
        self.image, self.text = TowerMasks(vision), TowerMasks(text)
        self.multipliers = nn.Parameter(torch.full((2,), 10.0))
        self.total = sum(prunable_size(tower) for tower in plain_configs(whole))
        now = prunable_size(vision) + prunable_size(text)
        self.start = 1 - now / self.total

    def draw(self) -> None:
        """Gates for one training step; keeps log alpha in its limits, as after every step."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name != "multipliers":
                    value.clamp_(-hard_concrete.LIMIT, hard_concrete.LIMIT)
        for tower in (self.image, self.text):
            tower.set_gates(lambda name, value: hard_concrete.sample(value))

    def decide(self) -> None:
        """Gates without chance; whole heads and at least `multiple_of` channels stay."""

        def choose(name: str, value: Tensor) -> Tensor:
            multiple = 1 if "heads" in name else min(self.cfg.multiple_of, len(value))
            return hard_concrete.decide(value.detach(), multiple, multiple)

        for tower in (self.image, self.text):
            tower.set_gates(choose)

    def sparsity(self) -> Tensor:
        """Expected share of the recipe's model's prunable parameters that is gone."""
        return 1 - (self.image.expected_size() + self.text.expected_size()) / self.total

    def loss(self, step: int) -> Tensor:
        """TinyCLIP's Lagrangian of the budget at a step."""
        done = min(1.0, step / self.cfg.ramp_steps)
        target = self.start + (1 - self.cfg.keep - self.start) * done
        missing = target - self.sparsity()
        if not self.cfg.two_sided:
            missing = torch.relu(missing)
        return self.multipliers[0] * missing + self.multipliers[1] * missing**2

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups: masks downhill, multipliers uphill."""
        shared = {"lr": self.cfg.lr, "weight_decay": 0.0}
        masks = [p for n, p in self.named_parameters() if n != "multipliers"]
        ascent = {"params": [self.multipliers], "maximize": True}
        return [{"params": masks, **shared}, {**ascent, **shared}]


class MaskedNorm(nn.LayerNorm):
    """A layer norm that sees only what the hidden mask lets through; shares its parameters."""

    def __init__(self, norm: nn.LayerNorm, masks: TowerMasks) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self._masks = (masks,)  # in a tuple, so that the masks are no part of this module

    def forward(self, x: Tensor) -> Tensor:
        gates = self._masks[0].gates["hidden"]
        with torch.autocast(x.device.type, enabled=False):
            return hard_concrete.masked_layer_norm(
                x.float(), gates, self.weight, self.bias, self.eps
            )


def attach_(model: ClipModel, masks: Masks) -> None:
    """Let the masks act on a model in place; names of its parameters stay."""
    towers: tuple[ImageTower | TextTower, ...] = plain_towers(model)
    for tower, own in zip(towers, (masks.image, masks.text), strict=True):
        for name, module in list(tower.named_modules()):
            if isinstance(module, nn.LayerNorm):
                parent, _, last = name.rpartition(".")
                setattr(tower.get_submodule(parent), last, MaskedNorm(module, own))
        for layer, block in enumerate(tower.blocks):
            assert isinstance(block, Block)
            block.attention.out.register_forward_pre_hook(partial(_mask_heads, own, layer))
            block.mlp.down.register_forward_pre_hook(partial(_mask_mlp, own, layer))


def _mask_heads(masks: TowerMasks, layer: int, module: nn.Module, inputs: Any) -> Tensor:
    [mixed] = inputs  # [B, L, H * K]
    gates = masks.gates[f"heads.{layer}"].repeat_interleave(masks.head_width)
    return mixed * gates.to(mixed.dtype)


def _mask_mlp(masks: TowerMasks, layer: int, module: nn.Module, inputs: Any) -> Tensor:
    [hidden] = inputs  # [B, L, M]
    return hidden * masks.gates[f"mlp.{layer}"].to(hidden.dtype)


def pruned(model: ClipModel, masks: Masks) -> tuple[ClipModel, dict[str, Cut]]:
    """The smaller model that computes what the masked one does with its gates, and what is left of
    each parameter. Soft gates are multiplied into the weights.
    """
    weights: dict[str, Tensor] = {}
    cuts: dict[str, Cut] = {}
    config = model.config.model_dump()
    for side, own in (("image", masks.image), ("text", masks.text)):
        rules = _rules(own)
        for name, value in model.get_submodule(side).state_dict().items():
            chosen = rules(name, value)
            kept = tuple(None if gate is None else (gate > 0).nonzero()[:, 0] for gate in chosen)
            for dim, gate in enumerate(chosen):
                if gate is not None:
                    value = value * gate.view([-1 if d == dim else 1 for d in range(value.ndim)])
            weights[f"{side}.{name}"] = cut(value, kept).clone()
            cuts[f"{side}.{name}"] = kept
        tower = config["vision" if side == "image" else "text"]
        tower["width"] = int((own.gates["hidden"] > 0).sum())
        layers = range(len(tower["heads"]))
        for key, mask in (("heads", "heads"), ("mlp_width", "mlp")):
            tower[key] = tuple(int((own.gates[f"{mask}.{n}"] > 0).sum()) for n in layers)
    for name, value in model.state_dict().items():
        if name.split(".")[0] not in ("image", "text"):
            weights[name] = value.clone()
    return build(ClipConfig.model_validate(config), weights, "inherit"), cuts


Gates = tuple[Tensor | None, ...]


def _rules(masks: TowerMasks) -> Callable[[str, Tensor], Gates]:
    """(parameter's name, value) -> gates along each of its dimensions.

    What adds to the residual stream takes the soft gates; what reads from it only their zeros.
    """
    soft = masks.gates["hidden"]
    hard = (soft > 0).to(soft.dtype)

    def rule(name: str, value: Tensor) -> Gates:
        rest = (None,) * (value.ndim - 1)
        if name.startswith("blocks."):
            _, layer, *path = name.split(".")
            return _block_rule(masks, int(layer), ".".join(path), rest, soft, hard)
        module = name.split(".")[0]
        if module in ("patch", "class_token", "norm_pre"):
            return (soft, *rest)
        if module in ("position", "token"):
            return (None, soft)
        if module in ("norm_post", "norm_final"):
            return (hard, *rest)
        if name == "projection.weight":
            return (None, hard)
        raise PocketclipError(f"automatic inheritance does not know what {name} does to the width")

    return rule


def _block_rule(
    masks: TowerMasks, layer: int, name: str, rest: Gates, soft: Tensor, hard: Tensor
) -> Gates:
    heads = masks.gates[f"heads.{layer}"].repeat_interleave(masks.head_width)
    mlp = masks.gates[f"mlp.{layer}"]
    columns = {"attention.out.weight": heads, "mlp.down.weight": mlp}
    if name in columns:
        return (soft, columns[name])
    if name in ("attention.out.bias", "mlp.down.bias"):
        return (soft,)
    if name.startswith(("norm1.", "norm2.")):
        return (hard,)
    whole = {
        "attention.qkv": (heads > 0).to(soft.dtype).repeat(3),
        "mlp.up": (mlp > 0).to(soft.dtype),
    }
    rows = whole[name.rpartition(".")[0]]
    return (rows, hard) if rest else (rows,)


def plain_towers(model: ClipModel) -> tuple[ImageTower, TextTower]:
    """Both towers, if automatic inheritance knows how to cut them; else PocketclipError."""
    plain_configs(model.config)
    return plain_image_tower(model, PLACE), plain_text_tower(model, PLACE)


def plain_configs(config: ClipConfig) -> tuple[VisionConfig, TextConfig]:
    """Both towers' structures: pre-norm transformers of which only layer norms read the stream."""
    vision, text = config.vision, config.text
    if isinstance(vision, VisionConfig) and isinstance(text, TextConfig):
        odd = [
            vision.post_norm or text.post_norm,
            vision.projection != "linear" or text.projection != "linear",
            vision.projection_bias or text.projection_bias,
            vision.pooling == "attention" or vision.norm_after_pooling,
            not vision.norm_before_pooling or not text.final_norm,
            text.embedding_norm or text.class_token,
        ]
        if not any(odd):
            return vision, text
    raise PocketclipError(
        f"{PLACE} needs two pre-norm transformers with linear projections (CLIP's own design): "
        "leave it out, and inherit by hand with the inherit stage"
    )
