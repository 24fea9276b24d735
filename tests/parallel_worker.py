"""One process of a torchrun: gradients or a short training, for test_parallel.py to compare.

Gradients are of float32 and of float64 weights.

python parallel_worker.py TASK STRATEGY FOLDER STEPS
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_clip, tiny_work

from compress import parallel
from compress.batches import Sampler, embed_images
from compress.clip import Clip
from compress.feed import Batches
from compress.losses import TeacherFeatures
from compress.model import ClipModel
from compress.objective import ALONE, FROM_TEACHER
from compress.phases import Phase
from compress.stages import distill, pretrain
from compress.stages.distill import Banks

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
EVERY_LOSS = dict.fromkeys((*FROM_TEACHER, *ALONE), 0.5)


class Stopped(Exception):
    """Stands for a kill."""


def gradients(strategy: str, folder: Path, dtype: torch.dtype) -> None:
    """Save the gradients of one step of every loss."""
    work = replace(
        tiny_work(folder / f"{dtype}-{parallel.rank()}"),
        clip=biased(tiny_clip()),
        teacher=biased(tiny_clip(seed=2, embed_dim=24)),
    )
    # Stored vectors: the teacher itself would round differently in halves of the batch.
    settings = {**SETTINGS, **EVERY_LOSS, "teacher": "stored", "num_hard_negatives": 3}
    cfg = distill.Config(**settings, strategy=strategy)
    torch.manual_seed(0)
    feed = Batches(work, cfg, Sampler(work.data.pairs), folder / str(dtype))
    learner = distill.Learner(work.clip, cfg, feed.widths, work.teacher.model.config).to(dtype)
    wrapped = parallel.wrap(learner, strategy)
    work.teacher.model.to(dtype)
    batch = in_dtype(replace(feed.at(0), bank=Banks(learner, feed, work, cfg).at(0)), dtype)
    torch.manual_seed(1)
    loss, _ = wrapped(batch, 0, torch.autocast("cpu", enabled=False))
    loss.backward()
    parallel.average_replicated_(learner)
    found = {
        name: parallel.whole(value.grad)
        for name, value in learner.named_parameters()
        if value.grad is not None
    }
    if parallel.rank() == 0:
        torch.save(found, folder / f"gradients-{strategy}-{dtype}.pt")


def biased(clip: Clip) -> Clip:
    """With a bias, which sigmoid losses train."""
    config = clip.model.config.model_copy(update={"logit_bias": True})
    model = ClipModel(config)
    model.load_state_dict({**clip.model.state_dict(), "logit_bias": torch.tensor(-2.0)})
    return replace(clip, model=model)


def in_dtype(batch: distill.Batch, dtype: torch.dtype) -> distill.Batch:
    """The batch with pixels and teachers' vectors of another type."""
    teachers = [
        TeacherFeatures(t.u.to(dtype), t.v.to(dtype), t.scale, t.bias) for t in batch.teachers
    ]
    return replace(batch, pixels=batch.pixels.to(dtype), teachers=tuple(teachers))


def training(strategy: str, folder: Path, stop_at: int) -> None:
    """Train 6 steps, or up to `stop_at`; continues from a checkpoint."""
    work = tiny_work(folder / f"data-{parallel.rank()}")
    settings = {**SETTINGS, "momentum": 0.5, "momentum_decay": 0.5}
    cfg = distill.Config(**settings, steps=6, checkpoint_every=2, strategy=strategy)
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


def pretraining(strategy: str, folder: Path) -> None:
    """Pretrain 3 steps; save the weights and how many images this process has embedded."""
    work = tiny_work(folder / f"data-{parallel.rank()}")
    cfg = pretrain.Config(
        steps=3, batch_size=8, precision="fp32", warmup_steps=2, strategy=strategy,
        phases=(Phase(until=1.0, image_size=32, keep=0.5),),
    )  # fmt: skip
    rows: list[int] = []

    def counted(tower: torch.nn.Module, pixels: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(pixels))
        return embed_images(tower, pixels, *rest)  # type: ignore[arg-type]

    pretrain.embed_images = counted
    model = pretrain.run(work, cfg, folder / "out").clip.model
    state = {"rows": torch.tensor(rows), **model.state_dict()}
    torch.save(state, folder / f"pretrained-{parallel.rank()}.pt")


if __name__ == "__main__":
    task, strategy, folder, steps = sys.argv[1:]
    torch.set_num_threads(1)
    parallel.start("cpu")
    if task == "gradients":
        for dtype in (torch.float32, torch.float64):
            gradients(strategy, Path(folder), dtype)
    elif task == "pretraining":
        pretraining(strategy, Path(folder))
    else:
        training(strategy, Path(folder), int(steps))
    parallel.stop()
