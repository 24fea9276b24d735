"""Block reconstruction: learn which way each weight is rounded, one block after the other.

BRECQ's order (arXiv 2102.05426) with AdaRound's variables (arXiv 2004.10568) and QDrop's random
float activations (arXiv 2203.05740), on the plain squared error of the block's output. Unlike in
the papers, every step computes with the codes that the variables stand for, and gradients pass
straight through: after a few hundred steps AdaRound's soft codes still lie between two codes, and
settle on worse ones than the nearest.

Shapes: B samples, N tokens, D width; rounding variables have their weight's shape [O, D].
"""

import copy

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.calibrate import Calibration
from compress.errors import PocketclipError
from compress.model import ImageTower, TextTower
from compress.nn.fake import ActRounding, RoundedLinear
from compress.progress import tracked
from compress.ptq import Quantized
from compress.upstream import UpstreamTower

# AdaRound's stretch of the sigmoid, so that 0 and 1 are reached.
STRETCH = (-0.1, 1.1)


class Config(BaseModel):
    """How long and how hard rounding is learnt."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    iterations: int = Field(default=400, ge=1)
    """Steps per block; the papers take 20 000."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per step."""
    lr: float = Field(default=3e-2, gt=0)
    """Adam's learning rate of the rounding variables; falls to 0 along a line, as the next does."""
    scale_lr: float = Field(default=1e-3, ge=0)
    """Adam's learning rate of the logarithms of the inputs' scales (LSQ); 0 keeps them."""
    drop: float = Field(default=0.5, ge=0, le=1)
    """QDrop's chance of an activation to stay float in a step."""


def reconstruct_(made: Quantized, calibration: Calibration, cfg: Config, seed: int) -> None:
    """Improve the rounded model's blocks in place; weights end on their grid.

    A block that computes no better on the calibration samples stays as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, inputs in (("image", calibration.pixels), ("text", calibration.tokens)):
        rounded, plain = getattr(made.model, name), getattr(made.folded, name)
        if isinstance(rounded, UpstreamTower):
            raise PocketclipError(
                f"reconstruction needs our own blocks; this is {rounded.config.name}"
            )
        if not any(isinstance(m, RoundedLinear) for m in rounded.blocks.modules()):
            continue
        counts = _counted(rounded, inputs)
        for index in tracked(range(len(rounded.blocks)), f"learning to round the {name} tower"):
            wanted_in, wanted = _block_io(plain, index, inputs)
            found_in, found = _block_io(rounded, index, inputs)
            mask = _mask(rounded, wanted_in)
            block = rounded.blocks[index]
            layers = [m for m in block.modules() if isinstance(m, RoundedLinear) and m.codes]
            if not layers:
                continue
            before = copy.deepcopy(block.state_dict())
            _learn_(block, layers, (wanted_in, found_in, wanted, counts), mask, cfg, generator)
            with torch.no_grad():
                after = _error(block(found_in, mask), wanted, counts)
            if not after < _error(found, wanted, counts):
                block.load_state_dict(before)


def _counted(tower: ImageTower | TextTower, inputs: Tensor) -> Tensor:
    """1 for tokens that reach the embedding, 0 for padding behind the end of a text: [B, N, 1]."""
    if isinstance(tower, ImageTower):
        return torch.ones(len(inputs), 1, 1)
    if tower.config.causal and tower.config.pooling == "argmax":
        places = torch.arange(inputs.shape[1])
        return (places <= inputs.argmax(-1, keepdim=True)).float().unsqueeze(-1)
    return torch.ones(len(inputs), 1, 1)


def _mask(tower: ImageTower | TextTower, x: Tensor) -> Tensor | None:
    mask = getattr(tower, "mask", None)
    return None if mask is None else mask[: x.shape[1], : x.shape[1]]


@torch.no_grad()
def _block_io(tower: ImageTower | TextTower, index: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of a block, [B, N, D] each."""
    seen: list[Tensor] = []
    hook = tower.blocks[index].register_forward_hook(
        lambda _, args, out: seen.extend((args[0], out))
    )
    tower(inputs)
    hook.remove()
    return seen[0], seen[1]


def _learn_(
    block: nn.Module,
    layers: list[RoundedLinear],
    io: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    cfg: Config,
    generator: torch.Generator,
) -> None:
    plain_in, rounded_in, wanted, counts = io
    variables = [_start(layer).requires_grad_() for layer in layers]
    acts = [m for m in block.modules() if isinstance(m, ActRounding) and m.kind == "static"]
    groups = [{"params": variables, "lr": cfg.lr}]
    groups += [{"params": [a.log_scale for a in acts], "lr": cfg.scale_lr}] if cfg.scale_lr else []
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, cfg.iterations)
    for act in acts:
        act.drop = cfg.drop
    for _ in range(cfg.iterations):
        rows = torch.randint(len(wanted), (cfg.batch_size,), generator=generator)
        x = torch.where(
            torch.rand(plain_in[rows].shape, generator=generator) < cfg.drop,
            plain_in[rows],
            rounded_in[rows],
        )
        for layer, variable in zip(layers, variables):
            assert layer.codes is not None
            layer.codes.soft = _chosen(variable)
        loss = _error(block(x, mask), wanted[rows], counts[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    for act in acts:
        act.drop = 0.0
    for layer, variable in zip(layers, variables):
        _settle_(layer, variable)
    block.zero_grad(set_to_none=True)


def share(variable: Tensor) -> Tensor:
    """AdaRound's rectified sigmoid, eq. 23: how much of a step lies above the floor, in 0..1."""
    low, high = STRETCH
    return (variable.sigmoid() * (high - low) + low).clamp(0, 1)


@torch.no_grad()
def _start(layer: RoundedLinear) -> Tensor:
    """Variables whose share is where the weight lies between two codes."""
    assert layer.codes is not None
    scale, _ = layer.codes.per_column(layer.weight)
    steps = layer.weight / scale
    low, high = STRETCH
    return torch.logit(((steps - steps.floor()) - low) / (high - low))


def _chosen(variable: Tensor) -> Tensor:
    """0 or 1, the nearer to the share, with the share's gradient."""
    part = share(variable)
    return (part >= 0.5).to(part.dtype) + (part - part.detach())


def _error(found: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Squared distance of a block's output, mean over tokens [B, N, D]; padding counts 0."""
    return ((found - wanted).square() * counts).sum(-1).mean()


@torch.no_grad()
def _settle_(layer: RoundedLinear, variable: Tensor) -> None:
    """Put the weight on the codes that were learnt."""
    assert layer.codes is not None
    layer.codes.soft = _chosen(variable)
    layer.weight.copy_(layer.rounded_weight())
    layer.codes.soft = None
