"""A rough forecast of steps that never ran here: their multiply-adds over this machine's rate."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from compress import plugin
from compress.inspect import num_macs
from compress.jobs import TEACHER
from compress.recipe import Recipe, Step
from compress.structure import ClipConfig

EFFICIENCY = 0.6
"""Share of a plain matrix product's rate that a training step reaches on a CPU."""
EXPORT_SECONDS = 5.0
"""Most of an export is tracing and checking both towers, whatever their size."""

OPEN_SECONDS = 2.0
"""Opening and saving a model of a few million parameters, or cutting it."""


def forecast(recipe: Recipe) -> dict[str, float]:
    """Seconds by step folder, for what can be told without running; models by name are not opened.

    Good to a factor of two or so: a first run replaces it by what it took.
    """
    found = {f"export/{step.folder_name}": EXPORT_SECONDS for step in recipe.export}
    if recipe.export:
        found["teacher/onnxruntime-fp32"] = EXPORT_SECONDS
    found |= {TEACHER: OPEN_SECONDS, "bench": _timing_seconds(recipe)}
    if plugin.split_source(recipe.model)[0] not in ("folder", "new"):
        return found
    config = teacher = plugin.source(recipe.model, recipe.folder).model.config
    rate = multiply_adds_per_second()
    for index, step in enumerate(recipe.stages):
        stage = plugin.find(plugin.STAGES, step.name)
        if hasattr(stage, "shape"):
            config = stage.shape(config, step.config)
        work = _training_multiply_adds(step, config, teacher)
        found[f"{index:02d}-{step.name}"] = work / (rate * EFFICIENCY) if work else OPEN_SECONDS
    return found


def multiply_adds_per_second(size: int = 512, seconds: float = 0.3) -> float:
    """How fast this machine's cores multiply float32 matrices, other load left out of account."""
    matrix, threads = torch.rand(size, size), torch.get_num_threads()
    torch.set_num_threads(1)
    count, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        matrix @ matrix
        count += 1
    rate = count * size**3 / (time.process_time() - started)
    torch.set_num_threads(threads)
    return rate * threads


def multiply_adds(config: ClipConfig) -> int:
    """One image and one text through their towers."""
    return sum(num_macs(config).values())


def _training_multiply_adds(step: Step, config: ClipConfig, teacher: ClipConfig) -> float:
    """Forward, and twice as much backward, for each pair of each step; 0 without steps."""
    settings = step.config.model_dump()
    pairs = settings.get("steps", 0) * settings.get("batch_size", 0)
    once = multiply_adds(teacher) if settings.get("teacher") == "online" else 0
    share = _token_share(settings.get("phases", ()), config.vision.image_size)
    return float(pairs * share * (3 * multiply_adds(config) + once))


def _token_share(phases: Sequence[dict[str, Any]], image_size: int) -> float:
    """Mean share of a full image's tokens, over phases of low resolution or dropped patches."""
    share, start = 0.0, 0.0
    for phase in phases:
        tokens = (phase["image_size"] / image_size) ** 2 * phase["keep"]
        share, start = share + (phase["until"] - start) * tokens, phase["until"]
    return share + 1.0 - start


def _timing_seconds(recipe: Recipe) -> float:
    """Time of the latency rounds alone; accuracy depends on data that is not read here."""
    bench, candidates = recipe.bench, 2 * (len(recipe.export) + 1)
    one = bench.warmup_seconds + bench.rounds * bench.round_seconds
    return len(bench.threads) * bench.processes * candidates * one
