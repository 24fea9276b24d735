"""Measures a finished run: accuracy of every artifact, latency of every bundle, two JSON files.

bench.json holds everything, raw samples included; summary.json is what others read.
"""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import bundles, examples, latency, machine, summary
from benchmarks.accuracy import Accuracy
from benchmarks.bundles import TOWERS, Bundle
from benchmarks.hosts.local import Artifact
from benchmarks.latency import Config as Config
from benchmarks.latency import Timing
from compress import atomic
from compress.clip import load
from compress.work import Work

if TYPE_CHECKING:
    from compress.recipe import Recipe

SCHEMA_VERSION = 1
TEACHER, STUDENT = "teacher", "student"
BASELINE = "teacher/onnxruntime-fp32"
"""Folder of what every speed-up is measured against: the teacher in ONNX Runtime, float32."""
NUM_EXAMPLES = 12
"""Pictures shown in the report."""

Rows = list[dict[str, Any]]


def bench(run_dir: Path, recipe: "Recipe", work: Work) -> None:
    """Evaluate and time what the run folder holds; write bench.json and summary.json there.

    Raises PocketclipError where an artifact gives broken embeddings or its files changed.
    """
    started = time.perf_counter()
    accuracy = Accuracy(work.data, recipe.evaluate)
    artifact = STUDENT if recipe.stages else TEACHER
    found, rows_without = _bundles(run_dir, artifact)
    rows = accuracy.of_torch(work.teacher, TEACHER, TEACHER)
    stages = _stages(accuracy, run_dir)
    if recipe.stages:
        rows += accuracy.of_torch(work.clip, STUDENT, _stage_folders(run_dir)[-1].name)
    for bundle in found:
        clip = work.teacher if bundle.artifact == TEACHER else work.clip
        rows += accuracy.of_bundle(bundle, clip, _path(bundle.folder, run_dir))
    evaluated = time.perf_counter()
    # A latency means nothing without the accuracy of the same file, so without data none is taken.
    timed = found if accuracy.headline else []
    timings, disturbance = _timings(timed, recipe.bench, run_dir, run_dir / BASELINE)
    seconds = {
        "bench: accuracy": round(evaluated - started, 1),
        "bench: latency": round(time.perf_counter() - evaluated, 1),
    }
    content = {
        "schema_version": SCHEMA_VERSION,
        "name": recipe.name,
        "recipe_sha256": recipe.sha256,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "headline_split": accuracy.headline,
        "settings": _settings(recipe),
        "seconds": seconds,
        "artifacts": rows + rows_without,
        "stages": stages,
        "timings": timings,
        "disturbance": disturbance,
        "examples": _examples(accuracy, rows, timings),
    }
    _write(run_dir, content)


def bench_bundles(folders: Sequence[Path], cfg: Config) -> Rows:
    """Time bundles side by side; the first one is what `speedup` of the others refers to.

    One row per bundle, tower and thread count: `path`, `tower`, `threads`, `size_bytes`, and the
    keys of `latency.summarise`, or `unavailable` with the reason. These rows are for the terminal:
    without accuracy they don't belong into a summary.
    """
    found = [bundles.read(folder) for folder in folders]
    return _timings(found, cfg, Path(), folders[0])[0]


def _write(run_dir: Path, content: dict[str, Any]) -> None:
    path = run_dir / "manifest.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else []
    table = summary.summarise(content, steps)
    # Compact: with one sample a line the file would be several times as long.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    atomic.write_text(run_dir / "bench.json", text + "\n")
    atomic.write_json(run_dir / "summary.json", table)


def _settings(recipe: "Recipe") -> dict[str, Any]:
    return {
        "model": recipe.model,
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "bench": recipe.bench.model_dump(mode="json"),
        "templates": list(recipe.data.templates),
    }


def _bundles(run_dir: Path, artifact: str) -> tuple[list[Bundle], Rows]:
    """The baseline and the exports; rows with the reason for those that could not be written."""
    found, rows_without = [], []
    if (run_dir / BASELINE / "bundle.json").exists():
        found.append(bundles.read(run_dir / BASELINE, TEACHER))
    for folder in sorted((run_dir / "export").glob("*")):
        if (folder / "bundle.json").exists():
            found.append(bundles.read(folder, artifact))
        elif (folder / "unavailable.json").exists():
            about = json.loads((folder / "unavailable.json").read_text())
            rows_without += [
                {
                    "artifact": artifact,
                    "target": about["target"],
                    "precision": about["precision"],
                    "executed": False,
                    "path": _path(folder, run_dir),
                    "tower": tower,
                    "sha256": None,
                    "unavailable": about["reason"],
                    "accuracy": {},
                }
                for tower in TOWERS
            ]
    return found, rows_without


def _path(folder: Path, run_dir: Path) -> str:
    """Relative to the run folder, so that the folder can be moved."""
    inside = folder.is_relative_to(run_dir)
    return (folder.relative_to(run_dir) if inside else folder).as_posix()


def _stage_folders(run_dir: Path) -> list[Path]:
    return sorted(path.parent for path in run_dir.glob("[0-9][0-9]-*/model.json"))


def _stages(accuracy: Accuracy, run_dir: Path) -> Rows:
    """Accuracy after each stage but the last, whose model is the student."""
    if accuracy.headline is None:
        return []
    folders = _stage_folders(run_dir)[:-1]
    return [
        {"folder": folder.name, "accuracy": accuracy.on_headline(load(folder), folder.name)}
        for folder in folders
    ]


def _timings(
    found: list[Bundle], cfg: Config, root: Path, baseline: Path
) -> tuple[Rows, dict[str, Any]]:
    """Every bundle, tower and thread count, all against each other; and how busy it was."""
    if not found:
        return [], {}
    owners = [(bundle, t, n) for n in cfg.threads for bundle in found for t in TOWERS]
    artifacts = [
        Artifact(bundle.target, bundle.folder, tower, threads, bundle.queries(tower))
        for bundle, tower, threads in owners
    ]
    timings, disturbance = latency.measure(artifacts, cfg)
    rows = []
    for (bundle, tower, threads), timing in zip(owners, timings):
        reference = _reference(timing, timings, baseline)
        rows.append(
            {
                "path": _path(bundle.folder, root),
                "tower": tower,
                "threads": threads,
                "cores": timing.cores,
                "sha256": bundle.sha256(tower),
                "size_bytes": bundle.size_bytes(tower),
                **latency.summarise(timing, cfg, reference),
                "opened": timing.opened,
                "warmups": timing.warmups,
                "rounds_ms": [samples.round(5).tolist() for samples in timing.rounds],
                "processor_rounds_ms": [s.round(5).tolist() for s in timing.processor_rounds],
            }
        )
    return rows, disturbance


def _reference(timing: Timing, timings: list[Timing], baseline: Path) -> Timing | None:
    """The baseline's timing of the same tower with as many threads."""
    own = timing.artifact
    for other in timings:
        same = (other.artifact.tower, other.artifact.threads) == (own.tower, own.threads)
        if same and other.artifact.folder == baseline:
            return other
    return None


def _examples(accuracy: Accuracy, rows: Rows, timings: Rows) -> dict[str, Any]:
    """What the teacher and the fastest student see in a few pictures; empty without classes."""
    students = {row["path"] for row in rows if row["artifact"] == STUDENT}
    timed = [t for t in timings if t["path"] in students and t["tower"] == "image"]
    ranked = sorted((t for t in timed if "p50_ms" in t), key=lambda t: t["p50_ms"])
    path = next(iter([t["path"] for t in ranked] or sorted(students)), None)
    teacher = accuracy.headline_vectors.get(TEACHER)
    student = accuracy.headline_vectors.get(path or "")
    if teacher is None or student is None or not len(teacher.classes):
        return {}
    pairs = accuracy.data.split(teacher.split.name)
    seed = accuracy.cfg.seed
    return {"path": path, **examples.compare(teacher, student, pairs, NUM_EXAMPLES, seed)}
