"""What a student learns from: every way of distillation at equal samples and at equal time.

    python -m benchmarks.experiments.distillation            about four hours on two cores
    python -m benchmarks.experiments.distillation --quick    minutes; shows only that it works
    python -m benchmarks.experiments.distillation --finished   train no more, write what there is

Each arm of `_distillation_arms.py` trains the quickstart's student (a fifth of the teacher's
parameters) on the embedded data, three seeds, at a budget of samples and a tenth of it; scratch and
the best arms also in between, and the best arm long. Teachers' vectors come from one reinforced
store, made once; the arm "all" stores more views of its own. Every finished training is kept in
runs/distillation, and rows of the committed results stand while their settings do, so a stopped
experiment continues. At the end the cost of a step is measured, with the teacher stored, online and
absent, interleaved.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.experiments import _distillation_arms as arms
from benchmarks.experiments._distillation_arms import (
    ARMS,
    SHARED,
    STUDENT,
    distill_settings,
    jobs,
)
from benchmarks.experiments._distillation_claims import claims as claims
from benchmarks.experiments._distillation_steps import step_rows
from compress.atomic import write_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
RESULTS = ROOT / "benchmarks/results/distillation.json"
RUNS = ROOT / "runs/distillation"
QUICK = ROOT / "runs/distillation-quick"
MODULE = "benchmarks.experiments.distillation"
FIGURES = ("top1", "top5", "image_to_text_r1", "text_to_image_r1", "text_to_image_r10")


def row_file(folder: Path, arm: str, seed: int, steps: int) -> Path:
    """Where a finished training's row is kept."""
    return folder / f"{arm.replace(' ', '-')}-{seed}-{steps}.json"


def kept_row(folder: Path, arm: str, seed: int, steps: int) -> dict[str, Any] | None:
    """A finished training's row: of this folder, or of the committed results if its settings are
    still the arm's.
    """
    path = row_file(folder, arm, seed, steps)
    if path.exists():
        return dict(json.loads(path.read_text()))
    wanted = {"arm": arm, "seed": seed, "steps": steps, "settings": arms.digest(arm, steps)}
    return next((row for row in committed(folder) if wanted.items() <= row.items()), None)


def committed(folder: Path) -> list[dict[str, Any]]:
    """The committed results, unless the run is a quick one; without the file all is measured."""
    if folder != RUNS or not RESULTS.exists():
        return []
    return list(json.loads(RESULTS.read_text())["rows"])


def train(arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one student, measure it on the held-out style, and keep the row."""
    from compress.clip import TorchEncoder
    from compress.evaluate import evaluate
    from compress.stages import distill, exact

    if row := kept_row(folder, arm, seed, steps):
        return row
    chosen, path = ARMS[arm], row_file(folder, arm, seed, steps)
    work = open_work(folder, seed)
    len(work.data.pairs)  # decoded before the clock starts
    started, cpu = time.perf_counter(), time.process_time()
    clip, earlier = started_student(work, arm, folder)
    work = replace(work, clip=clip)
    if chosen.pooled_last:
        work = exact.run(work, exact.Config(context="keep", classes=False), folder)
    samples = chosen.calibrated
    for number, settings in enumerate(distill_settings(arm, steps)):
        out = folder / path.stem / str(number)
        with shared_store(folder / f"views-{seed}", out / "store"):
            work = distill.run(work, distill.Config.model_validate(settings), out)
        samples += settings["steps"] * settings["batch_size"]
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu + earlier
    row = {"arm": arm, "seed": seed, "steps": steps, "settings": arms.digest(arm, steps)}
    row |= {"samples": samples, "train_seconds": seconds, "train_cpu_seconds": cpu}
    row["cpu"] = machine.describe()["cpu"]
    row["num_params"] = sum(p.numel() for p in work.clip.model.parameters())
    measured = evaluate(TorchEncoder(work.clip), work.clip, work.data, "held_out_style")
    row |= {key: measured[key] for key in FIGURES}
    write_json(path, row)
    for checkpoint in (folder / path.stem).rglob("checkpoint.pt"):
        checkpoint.unlink()  # not earlier: a row that could not be measured would be lost
    return row


def started_student(work: Any, arm: str, folder: Path) -> tuple[Any, float]:
    """A student before distillation, and the CPU seconds that an earlier call spent on it."""
    from compress.sources import new

    shape = ARMS[arm].inherit
    return (new.load(STUDENT), 0.0) if shape is None else inherited(work, shape, folder)


def inherited(work: Any, settings: dict[str, Any], folder: Path) -> tuple[Any, float]:
    """The teacher cut to a student, and the CPU seconds that an earlier call spent on it.

    A fit by least squares is made once a seed and kept.
    """
    import compress.clip
    from compress.stages import inherit

    cfg = inherit.Config.model_validate(settings)
    if cfg.weights == "leading":
        return inherit.run(work, cfg, folder).clip, 0.0
    place = folder / f"principal-{work.seed}"
    spent = place / "cpu_seconds.json"
    if not spent.exists():
        started = time.process_time()
        compress.clip.save(inherit.run(work, cfg, folder).clip, place)
        write_json(spent, time.process_time() - started)
        return compress.clip.load(place), 0.0
    return compress.clip.load(place), float(json.loads(spent.read_text()))


@contextmanager
def shared_store(kept: Path, own: Path) -> Iterator[None]:
    """A run's store of teacher's vectors, made by the first run of a seed and kept for the next."""
    if kept.exists() and not own.exists():
        shutil.copytree(kept, own)
    yield
    if own.exists() and not kept.exists():
        shutil.copytree(own, kept)


@lru_cache(maxsize=1)
def opened() -> tuple[Any, Any]:
    """The quickstart's teacher and data, prompts among the captions, decoded once a process."""
    from compress import plugin
    from compress import recipe as recipes

    recipe = recipes.load(RECIPE)
    return plugin.source(recipe.model, recipe.folder), recipe.shards().prompted()


def open_work(folder: Path, seed: int) -> Any:
    """The input of a stage, with the shared store once it is there."""
    import torch

    from compress.work import Work

    torch.manual_seed(seed)
    teacher, data = opened()
    store = folder / "store"
    return Work(teacher, teacher, data, "cpu", seed, store=store if store.exists() else None)


def make_store(folder: Path, views: int) -> float:
    """Reinforce the training data once -> CPU seconds."""
    from compress.stages import reinforce

    if (folder / "store.json").exists():
        return float(json.loads((folder / "store.json").read_text())["cpu_seconds"])
    started = time.process_time()
    cfg = reinforce.Config.model_validate(
        {
            "views": views,
            "augment": SHARED["augment"],
            "captions": {"source": "own", "num": 20},
        }
    )
    reinforce.run(open_work(folder, 0), cfg, folder)
    seconds = time.process_time() - started
    write_json(folder / "store.json", {"cpu_seconds": seconds})
    return seconds


def teacher_row(folder: Path) -> dict[str, Any]:
    """The teacher on the same split."""
    from compress.clip import TorchEncoder
    from compress.evaluate import evaluate

    path = folder / "teacher.json"
    kept = [row for row in committed(folder) if row.get("arm") == "teacher"]
    if kept and not path.exists():
        return kept[0]
    if not path.exists():
        work = open_work(folder, 0)
        encoder = TorchEncoder(work.teacher)
        measured = evaluate(encoder, work.teacher, work.data, "held_out_style")
        num = sum(p.numel() for p in work.teacher.model.parameters())
        figures = {key: measured[key] for key in FIGURES}
        write_json(path, {"arm": "teacher", "num_params": num, **figures})
    return dict(json.loads(path.read_text()))


def in_processes(num: int, folder: Path, quick: bool) -> None:
    """Train what is not there yet: `num` processes of one thread each share the trainings."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = []
    for number in range(num):
        command = [sys.executable, "-m", MODULE, "--jobs", str(num), "--worker", str(number)]
        with (folder / f"worker-{number}.log").open("w") as log:
            command += ["--quick"] if quick else []
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log))
    failed = [process for process in running if process.wait()]
    if failed:
        sys.exit(f"a training failed: see {folder}/worker-*.log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"4 steps; writes into {QUICK.name}")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--worker", type=int, help="one of them (used by this script itself)")
    parser.add_argument("--finished", action="store_true", help="write the finished trainings")
    given = parser.parse_args()
    folder = QUICK if given.quick else RUNS
    folder.mkdir(parents=True, exist_ok=True)
    if given.worker is not None:
        for job in jobs(given.quick)[given.worker :: given.jobs]:
            train(*job, folder)
        return
    rows, wanted = [teacher_row(folder)], jobs(given.quick)
    if given.finished:
        wanted = [job for job in wanted if kept_row(folder, *job)]
    else:
        rows[0]["store_cpu_seconds"] = make_store(folder, 1 if given.quick else 4)
        in_processes(given.jobs, folder, given.quick)
    rows += [train(*job, folder) for job in wanted]
    kept_steps = [row for row in committed(folder) if "step" in row]
    rows += kept_steps or step_rows(open_work(folder, 0), folder, 1 if given.quick else 8)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", MODULE, *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": sorted({seed for _, seed, _ in wanted}),
        "rows": rows,
        "claims": claims(rows),
    }
    write_json(QUICK / "distillation.json" if given.quick else RESULTS, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.3f} (goal {claim['goal']:g}) {verdict}")


if __name__ == "__main__":
    main()
