"""Training throughput of open_clip's trainer and of ours, in turns.

The same student and teacher (the embedded ones' shapes), the same batch size, bfloat16 autocast and
AdamW on both sides, one thread. open_clip's `train_one_epoch` is given ready tensors; our steps
draw, augment and tokenize theirs as in a run, so what differs in preparation counts against us.
Both profit from our setting of the allocator, as they share a process.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import export.open_clip
from benchmarks.statistics import interval
from compress.clip import Clip
from compress.feed import Feed, open_feed
from compress.learner import Batch, Learner
from compress.stages import distill
from compress.train import keep_freed_memory
from compress.work import Work

LR = 5e-4
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "open_clip, contrastive": ("open_clip", {"distill": False}),
    "ours, contrastive": ("ours", {"affinity": 0.0, "clip": 1.0, "scale": None}),
    "open_clip, distillation": ("open_clip", {"distill": True}),
    "ours, affinity, teacher online": ("ours", {"teacher": "online"}),
    "ours, affinity, teacher stored": ("ours", {"teacher": "stored", "views": 1}),
}
"""What trains, and with which settings."""


@dataclass
class Clock:
    """The times at which a trainer asks for a batch: all but the first step are counted."""

    asked: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.asked.append(time.perf_counter())

    def rate(self, batch_size: int) -> float:
        """Samples per second from the second step on, until now."""
        seconds = time.perf_counter() - self.asked[1]
        return batch_size * (len(self.asked) - 1) / seconds


def measure(
    student: Clip, work: Work, place: Path, batch_size: int, steps: int, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each arm: samples per second, median over the rounds with its interval."""
    keep_freed_memory()
    trainers = {
        name: _trainer(kind, settings, student, work, place, batch_size, steps)
        for name, (kind, settings) in ARMS.items()
    }
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    order = np.random.default_rng(seed)
    for _ in range(rounds):
        for name in order.permutation(list(ARMS)):
            found[str(name)].append(trainers[str(name)]())
    return [
        {
            "artifact": name,
            "ours": ARMS[name][0] == "ours",
            "task": "training",
            "batch_size": batch_size,
            "samples_per_second": float(np.median(rates)),
            "samples_per_second_ci95": _interval(rates, seed),
            "rounds": rates,
        }
        for name, rates in found.items()
    ]


def _trainer(
    kind: str,
    settings: dict[str, Any],
    student: Clip,
    work: Work,
    place: Path,
    batch_size: int,
    steps: int,
) -> Callable[[], float]:
    if kind == "open_clip":
        return _theirs(student, work, batch_size, steps, settings["distill"])
    cfg = distill.Config(
        steps=steps, batch_size=batch_size, lr=LR, warmup_steps=0, checkpoint_every=1000, **settings
    )
    return _ours(student, work, cfg, place / "ours")


def _ours(student: Clip, work: Work, cfg: distill.Config, place: Path) -> Callable[[], float]:
    """A turn of our distill stage: a fresh learner, `cfg.steps` steps."""
    given = Work(student, work.teacher, work.data, seed=work.seed)
    feed = open_feed(given, cfg, place)

    def turn() -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as scratch:
            learner = Learner(student, cfg, feed.widths, work.teacher.model.config)
            distill.train(learner, Ticking(feed, clock), given, cfg, Path(scratch))
            return clock.rate(cfg.batch_size)

    return turn


class Ticking:
    """A feed that tells a clock when a batch is asked for."""

    def __init__(self, feed: Feed, clock: Clock) -> None:
        self.feed, self.clock, self.widths = feed, clock, feed.widths

    @property
    def names(self) -> list[str]:
        return self.feed.names

    def teacher_bank(self) -> tuple[Tensor, ...]:
        return self.feed.teacher_bank()

    def at(self, step: int) -> Batch:
        self.clock.tick()
        return self.feed.at(step)


class Loader:
    """What open_clip's loop reads: ready batches, and how many there are."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int, clock: Clock) -> None:
        self.batch, self.num_batches, self.clock = batch, steps, clock
        self.num_samples = steps * len(batch[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_batches):
            self.clock.tick()
            yield self.batch


def _theirs(
    student: Clip, work: Work, batch_size: int, steps: int, with_teacher: bool
) -> Callable[[], float]:
    """A turn of open_clip's trainer: its own loss, loop and defaults of a ViT."""
    import open_clip
    from open_clip_train.params import parse_args
    from open_clip_train.train import train_one_epoch

    words = ["--precision", "amp_bf16", "--batch-size", str(batch_size), "--lr", str(LR)]
    args = parse_args([*words, "--model", "ViT", "--log-every-n-steps", "1000000"])
    args.distill, args.device, args.rank, args.world_size = with_teacher, "cpu", 0, 1
    args.distributed, args.horovod, args.skip_scheduler = False, False, True
    args.wandb = args.tensorboard = False
    model = as_open_clip(student)
    teacher = as_open_clip(work.teacher) if with_teacher else None
    batch = _batch(student, work, batch_size)
    loss = open_clip.create_loss(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(args.beta1, args.beta2))

    def turn() -> float:
        clock = Clock()
        loader = Loader(batch, steps, clock)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train_one_epoch(model, data, loss, 0, optimizer, None, None, teacher, args)
        return clock.rate(batch_size)

    return turn


def as_open_clip(clip: Clip) -> Any:
    """The same model, opened by open_clip itself."""
    import open_clip

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export.open_clip.write(clip, export.open_clip.Config(precision="fp32"), folder)
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", output_dict=True)
    return model


def _batch(clip: Clip, work: Work, batch_size: int) -> tuple[Tensor, Tensor]:
    """pixels [B, 3, S, S] and tokens [B, L] of the first training pairs."""
    pairs = work.data.pairs
    chosen = [n % len(pairs.captions) for n in range(batch_size)]
    pixels = torch.stack([clip.preprocess(pairs.image(n)) for n in chosen])
    return pixels, clip.tokenizer([pairs.captions[n][0] for n in chosen]).long()


def _interval(rates: list[float], seed: int) -> list[float]:
    """95 % interval of the median, over resampled rounds."""
    drawn = np.random.default_rng(seed).choice(rates, (1000, len(rates)))
    return interval(np.median(drawn, axis=1))
