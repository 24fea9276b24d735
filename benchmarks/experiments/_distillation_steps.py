"""What a training step costs with the teacher stored, online and absent."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.experiments._distillation_arms import PLAIN, REINFORCED, SHARED, STUDENT
from compress.atomic import write_json
from compress.feed import open_feed
from compress.learner import Learner
from compress.precision import autocast
from compress.sources import new
from compress.stages import distill
from compress.work import Work


def step_rows(work: Work, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """CPU seconds of one whole training step, and of reading the store in it, interleaved."""
    path = folder / f"steps-{rounds}.json"
    if path.exists():
        return list(json.loads(path.read_text()))
    torch.set_num_threads(1)
    kinds: dict[str, dict[str, Any]] = {
        "plain": PLAIN,
        "reinforced, one caption": {**REINFORCED, "synthetic": "mix"},
        "reinforced, two captions": REINFORCED,
        "teacher online": {"affinity": 1.0, "teacher": "online"},
    }
    work = replace(work, clip=new.load(STUDENT))
    made: dict[str, Any] = {}
    for name, settings in kinds.items():
        full = {**SHARED, **settings, "phases": [], "steps": 1000}
        cfg = distill.Config.model_validate(full)
        feed = open_feed(work, cfg, folder)
        learner = Learner(work.clip, cfg, feed.widths, work.teacher.model.config).train()
        made[name] = (cfg, feed, learner)
    rows: list[dict[str, Any]] = []
    cpu = machine.describe()["cpu"]
    for n in range(rounds + 1):
        for name, (cfg, feed, learner) in made.items():
            started = time.process_time()
            batch = feed.at(n)
            fed = time.process_time()
            loss, _ = learner(batch, n, autocast(cfg.precision, "cpu"))
            loss.backward()
            learner.zero_grad()
            ended = time.process_time()
            read = _reading(feed, batch) if "reinforced" in name else 0.0
            if n:  # the first one warms up
                row = {"step": name, "round": n, "cpu": cpu, "cpu_seconds": ended - started}
                rows.append({**row, "feed_seconds": fed - started, "store_seconds": read})
    write_json(path, rows)
    return rows


def _reading(feed: Any, batch: Any) -> float:
    """CPU seconds of looking up a batch's vectors and parameters in the store."""
    keys = feed.work.data.pairs.keys[: len(batch.pixels)]
    views = torch.zeros(len(keys), dtype=torch.long)
    started = time.process_time()
    feed.store.parameters(keys, views)
    feed._teachers(keys, views, [0] * len(keys))
    if batch.synthetic is not None:
        feed._teachers(keys, views, [0] * len(keys))
    return time.process_time() - started
