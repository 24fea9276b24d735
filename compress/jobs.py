"""The steps of a recipe as jobs: what each depends on, and what it does."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import benchmarks.run
import compress.clip
import export
from compress import atomic, plugin
from compress.clip import Clip
from compress.fold import fold
from compress.manifest import UNAVAILABLE, Job
from compress.recipe import Recipe, Step
from compress.train import Training
from compress.twin import float_twin
from compress.work import Data, Work

TEACHER = "teacher"
MEASURED = ("bench.json", "summary.json")


def jobs(recipe: Recipe, out: Path) -> list[Job]:
    """All steps of a recipe in the order in which they run."""
    models = _Models(recipe, out)
    parent = Job(TEACHER, _teacher_inputs(recipe), partial(_open_teacher, models))
    found = [parent]
    for index, step in enumerate(recipe.stages):
        action = partial(_run_stage, models, step, parent.folder)
        inputs = _stage_inputs(recipe, models.data, step, parent)
        parent = Job(f"{index:02d}-{step.name}", inputs, action, (parent.folder,))
        found.append(parent)
    models.student_folder = parent.folder
    exports = [_export_job(models, step, parent, "export") for step in recipe.export]
    if exports:
        exports.insert(0, _export_job(models, _reference(), found[0], TEACHER))
    found += exports
    inputs = _bench_inputs(recipe, models.data, [parent, *exports])
    inside = tuple(job.folder for job in found)
    return [*found, Job("bench", inputs, partial(_bench, models), inside, MEASURED)]


@dataclass
class _Models:
    """The models of a run, each opened from its folder when first needed."""

    recipe: Recipe
    out: Path
    student_folder: str = TEACHER
    opened: dict[str, Clip] = field(default_factory=dict)

    @cached_property
    def data(self) -> Data:
        """What the recipe names; enough for a step's key."""
        return self.recipe.shards()

    @cached_property
    def sized_data(self) -> Data:
        """The same, with training images as large as the teacher takes; decoded once for all."""
        return self.data.sized_for(self.get(TEACHER))

    def get(self, folder: str) -> Clip:
        if folder not in self.opened:
            self.opened[folder] = compress.clip.load(self.out / folder)
        return self.opened[folder]

    def put(self, clip: Clip, folder: Path) -> None:
        """Save a model; the next step opens the file, so that a resumed run sees the same bits."""
        compress.clip.save(clip, folder)
        self.opened.pop(folder.name, None)

    def work(self, folder: str) -> Work:
        device = self.recipe.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        data, store = self._made_before(folder)
        return Work(
            self.get(folder), self.get(TEACHER), data, device, self.recipe.seed, store=store
        )

    def _made_before(self, folder: str) -> tuple[Data, Path | None]:
        """The data as a curate stage left it, and the latest reinforced store, up to a stage."""
        data, store = self.sized_data, None
        for stage in sorted(self.out.glob("[0-9][0-9]-*")):
            if stage.name <= folder:
                if (stage / "curated.tar").exists():
                    data = replace(data, train=[stage / "curated.tar"])
                if (stage / "store/store.json").exists():
                    store = stage / "store"
        return data, store


def _open_teacher(models: _Models, folder: Path) -> None:
    _seed(models.recipe.seed)
    models.put(plugin.source(models.recipe.model, models.recipe.folder), folder)


def _run_stage(models: _Models, step: Step, parent: str, folder: Path) -> None:
    _seed(models.recipe.seed)
    started = time.perf_counter()
    work = plugin.find(plugin.STAGES, step.name).run(models.work(parent), step.config, folder)
    models.put(replace(work.clip, name=models.recipe.name), folder)
    weights = folder / "model.safetensors"
    metrics = {
        "num_params": sum(p.numel() for p in work.clip.model.parameters()),
        "num_image_params": sum(p.numel() for p in work.clip.model.image.parameters()),
        "num_text_params": sum(p.numel() for p in work.clip.model.text.parameters()),
        "size_bytes": weights.stat().st_size,
        "seconds": round(time.perf_counter() - started, 2),
    }
    atomic.write_json(folder / "metrics.json", metrics)


def joinable(recipe: Recipe, out: Path) -> dict[str, Callable[[Path], None]]:
    """By folder, the steps that several processes train together: what a later one does there."""
    models = _Models(recipe, out)
    found: dict[str, Callable[[Path], None]] = {}
    parent = TEACHER
    for index, step in enumerate(recipe.stages):
        folder = f"{index:02d}-{step.name}"
        if isinstance(step.config, Training):
            found[folder] = partial(_join_stage, models, step, parent)
        parent = folder
    return found


def _join_stage(models: _Models, step: Step, parent: str, folder: Path) -> None:
    """Take part in the training of a stage; the first process saves what comes out."""
    _seed(models.recipe.seed)
    models.opened.clear()
    plugin.find(plugin.STAGES, step.name).run(models.work(parent), step.config, folder)


def _run_export(models: _Models, step: Step, parent: str, folder: Path) -> None:
    exporter = plugin.find(plugin.EXPORTERS, step.name)
    try:
        clip = fold(replace(models.get(parent), data=models.sized_data))
        if not getattr(exporter, "HONOURS_SCHEME", False):
            clip = float_twin(clip)
        exporter.write(clip, step.config, folder)
    except export.Unavailable as reason:
        row = {"target": step.name, "precision": getattr(step.config, "precision", None)}
        atomic.write_json(folder / UNAVAILABLE, {**row, "reason": str(reason)})
        raise


def _bench(models: _Models, out: Path) -> None:
    _seed(models.recipe.seed)
    benchmarks.run.bench(out, models.recipe, models.work(models.student_folder))


def _reference() -> Step:
    """What every speed-up is measured against: the teacher in ONNX Runtime, float32."""
    config = plugin.find(plugin.EXPORTERS, "onnxruntime").Config(precision="fp32")
    return Step(name="onnxruntime", config=config)


def _export_job(models: _Models, step: Step, parent: Job, inside: str) -> Job:
    version = plugin.find(plugin.EXPORTERS, step.name).VERSION
    inputs = {"target": step.name, "version": version, "parent": parent.key}
    inputs["settings"] = step.config.model_dump(mode="json")
    if getattr(step.config, "calibrates", False):
        inputs["data"] = models.data.digest
    action = partial(_run_export, models, step, parent.folder)
    return Job(f"{inside}/{step.folder_name}", inputs, action, (parent.folder,))


def _teacher_inputs(recipe: Recipe) -> dict[str, Any]:
    kind, argument = plugin.split_source(recipe.model)
    inputs: dict[str, Any] = {"model": recipe.model}
    path = recipe.folder / argument
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    if path.exists():
        inputs["model files"] = {f.name: atomic.sha256(f) for f in files}
    if kind == "new":
        inputs["seed"] = recipe.seed
    return inputs


def _stage_inputs(recipe: Recipe, data: Data, step: Step, parent: Job) -> dict[str, Any]:
    return {
        "stage": step.name,
        "version": plugin.find(plugin.STAGES, step.name).VERSION,
        "settings": step.config.model_dump(mode="json"),
        "data": data.digest,
        "seed": recipe.seed,
        "parent": parent.key,
    }


def _bench_inputs(recipe: Recipe, data: Data, parents: list[Job]) -> dict[str, Any]:
    return {
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "bench": recipe.bench.model_dump(mode="json"),
        "data": data.evaluation_digest,
        "parent": [job.key for job in parents],
    }


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
