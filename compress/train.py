"""One training loop: AMP, cosine schedule, EMA, checkpoints and exact resume.

Every random choice of a step is a function of (seed, step): the caller draws its batch from
`step_generator`, and torch's global generator is seeded anew each step. So resuming needs no
generator state and no data position, and gives the very weights an unbroken run gives.
"""

import ctypes
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from compress import parallel
from compress.checkpoint import CHECKPOINT as CHECKPOINT
from compress.checkpoint import State, Surgery
from compress.errors import PocketclipError
from compress.optimizers import set_lr
from compress.precision import Precision

# glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX, by their numbers in malloc.h
MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 2**28, -4: 0}
StepLoss = Callable[[int], tuple[Tensor, dict[str, float]]]


class Training(BaseModel):
    """Settings of the loop, shared by every stage that trains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=1000, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=256, ge=2)
    """Pairs per step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for the rest."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; vectors and scales have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging coefficients."""
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm; a larger one is scaled down."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the averaged weights that the stage returns; 0 returns the last ones."""
    precision: Precision = "auto"
    """Autocast type of the forward pass; weights and optimiser stay fp32. fp16 scales the loss, and
    skips steps whose gradients overflow. auto: bf16 where the hardware is faster at it."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Pairs per forward pass of a process; their activations are computed again in the backward
    pass, one after the other, so that a batch of any size fits. The gradient stays that of the
    whole batch (GradCache). Default: activations are kept, which is faster."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """What the processes that torchrun starts share: batches, or batches and weights."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints: what a crash can lose."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of log.jsonl."""

    @model_validator(mode="after")
    def _precision_fits_strategy(self) -> "Training":
        if self.strategy == "fsdp2" and self.precision == "fp16":
            raise ValueError("fsdp2 needs precision: bf16 or fp32")
        return self


SettingsT = TypeVar("SettingsT", bound=Training)


def bank_fits_checkpoints(cfg: SettingsT, bank_every: int) -> SettingsT:
    """Refuse settings with which a checkpoint falls between two refreshes of a bank."""
    if cfg.checkpoint_every % bank_every:
        raise ValueError(
            f"checkpoint_every ({cfg.checkpoint_every}) must be a multiple of bank_every "
            f"({bank_every}), as a resumed run would differ from an unbroken one"
        )
    return cfg


def step_generator(seed: int, step: int) -> Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)


def learning_rate(cfg: Training, step: int) -> float:
    """Linear warm-up, then a cosine to `min_lr`."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * done)) / 2


def fit(
    model: nn.Module,
    step_loss: StepLoss,
    cfg: Training,
    seed: int,
    out: Path,
    surgery: Surgery | None = None,
) -> None:
    """Train `model` in place; it ends with the averaged weights, in evaluation mode.

    step_loss(step) -> (scalar loss, figures for the log). Checkpoints go to out/checkpoint.pt and
    are continued from; the log to out/log.jsonl. `surgery` cuts the model smaller at its step.
    Raises PocketclipError on a loss that is not finite, with the last checkpoint left in place.
    """
    keep_freed_memory()
    identity = {"settings": cfg.model_dump(mode="json"), "seed": seed}
    state = State(model, cfg, identity, surgery)
    first = state.resume(out)
    log = _open_log(out / "log.jsonl", first)
    model.train()
    with log, _progress() as progress:
        task = progress.add_task(out.name, total=cfg.steps, completed=first, figures="")
        for step in range(first, cfg.steps):
            if surgery and step == surgery.step:
                state.operate()
            torch.manual_seed((seed + 1) * 7_919 + step)
            lr = learning_rate(cfg, step)
            loss, figures = _step(state, step_loss, step, lr)
            state.average_(min(cfg.ema_decay, (1 + step) / (10 + step)))
            if step % cfg.log_every == 0 or step == cfg.steps - 1:
                line = {"step": step, "loss": loss, "lr": lr, **figures}
                log.write(json.dumps(line) + "\n")
                log.flush()
                progress.update(task, figures=f"loss {loss:.3f}")
            if (step + 1) % cfg.checkpoint_every == 0 and step + 1 < cfg.steps:
                state.save(out, step + 1)
            progress.update(task, completed=step + 1)
    if cfg.ema_decay:
        model.load_state_dict(state.average, strict=False)
    model.eval()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: a step's activations are then not paged in anew each step.

    Measured 10-15 % faster steps on two CPU cores; without glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in MALLOC_OPTIONS.items():
        libc.mallopt(option, value)


def finished(out: Path) -> None:
    """Remove the checkpoint of a stage whose result has been saved."""
    (out / CHECKPOINT).unlink(missing_ok=True)


def _step(
    state: State, step_loss: StepLoss, step: int, lr: float
) -> tuple[float, dict[str, float]]:
    cfg, scaler = state.cfg, state.scaler
    loss, figures = step_loss(step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise PocketclipError(
            f"loss is {value} at step {step} (lr {lr:.2e}, {cfg.precision}): lower lr, lengthen "
            "warmup_steps or use precision: fp32; the checkpoints before it are kept"
        )
    (scaler.scale(loss) if scaler else loss).backward()
    parallel.average_replicated_(state.model)
    if scaler:
        for optimizer in state.optimizers:
            scaler.unscale_(optimizer)
    apart = {id(p) for group in state.own_groups() for p in group["params"]}
    norm = parallel.clip_(state.model, cfg.clip_grad_norm, apart)
    set_lr(state.optimizers, lr)
    for optimizer in state.optimizers:
        if scaler:
            scaler.step(optimizer)
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if scaler:
        scaler.update()
    return value, {**figures, "grad_norm": float(norm)}


def _open_log(path: Path, first: int) -> Any:
    """Open the log for appending, without lines of steps that will be run again."""
    if parallel.rank():
        return Path(os.devnull).open("a")
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first]
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")


def _progress() -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        disable=parallel.rank() > 0,
    )
