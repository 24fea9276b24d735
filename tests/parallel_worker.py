"""One process of a torchrun: gradients or a short training, for test_parallel.py to compare.

python parallel_worker.py TASK STRATEGY FOLDER STEPS
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_clip, tiny_work

from compress import parallel
from compress.batches import Sampler
from compress.feed import Batches
from compress.stages import distill

SETTINGS = {
    "batch_size": 8,
    "precision": "fp32",
    "clip": 0.5,
    "feature": 1.0,
    "interactive": 0.5,
    "scale": None,
    "teacher": "online",
    "warmup_steps": 2,
    "bank_every": 1,
    "log_every": 1,
}


class Stopped(Exception):
    """Stands for a kill."""


def gradients(strategy: str, folder: Path) -> None:
    """Save the gradients of one step."""
    work = replace(
        tiny_work(folder / str(parallel.rank())), teacher=tiny_clip(seed=2, embed_dim=24)
    )
    cfg = distill.Config(**SETTINGS, strategy=strategy)
    torch.manual_seed(0)
    feed = Batches(work, cfg, Sampler(work.data.pairs), folder)
    learner = distill.Learner(work.clip, cfg, feed.widths, work.teacher.model.config)
    wrapped = parallel.wrap(learner, strategy)
    loss, _ = wrapped(feed.at(0), 0, torch.autocast("cpu", enabled=False))
    loss.backward()
    parallel.average_replicated_(learner)
    found = {
        name: parallel.whole(value.grad)
        for name, value in learner.named_parameters()
        if value.grad is not None
    }
    if parallel.rank() == 0:
        torch.save(found, folder / f"gradients-{strategy}-{parallel.size()}.pt")


def training(strategy: str, folder: Path, stop_at: int) -> None:
    """Train 6 steps, or up to `stop_at`; continues from a checkpoint."""
    work = tiny_work(folder / f"data-{parallel.rank()}")
    cfg = distill.Config(**SETTINGS, steps=6, checkpoint_every=2, strategy=strategy)
    feed_at = Batches.at

    def at(self: Batches, step: int) -> distill.Batch:
        if step == stop_at:
            raise Stopped
        return feed_at(self, step)

    Batches.at = at  # type: ignore[method-assign]
    try:
        student = distill.run(work, cfg, folder / "out").clip.model
    except Stopped:
        return
    if parallel.rank() == 0:
        torch.save(student.state_dict(), folder / f"weights-{stop_at}.pt")


if __name__ == "__main__":
    task, strategy, folder, steps = sys.argv[1:]
    torch.set_num_threads(1)
    parallel.start("cpu")
    if task == "gradients":
        gradients(strategy, Path(folder))
    else:
        training(strategy, Path(folder), int(steps))
    parallel.stop()
