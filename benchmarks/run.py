"""Measures a finished run: accuracy of every artifact, latency of every bundle, two JSON files.

bench.json holds everything, raw samples included; summary.json is what others read.
"""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from benchmarks import bundles, examples, latency, machine, precision, roofline, summary
from benchmarks.accuracy import Accuracy, num_params
from benchmarks.bundles import TOWERS, Bundle
from benchmarks.statistics import summarise
from benchmarks.timing import Artifact, Samples, Timing
from benchmarks.timing import Config as Config
from compress import atomic
from compress.clip import load
from compress.problems import Problems, validate
from compress.recipe_file import apply_override
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
        own = accuracy.of_bundle(bundle, clip, _path(bundle.folder, run_dir))
        rows += [r | {"layers": precision.layers(bundle.folder, r["tower"], clip)} for r in own]
    evaluated = time.perf_counter()
    # A latency means nothing without the accuracy of the same file, so without data none is taken.
    timed = found if accuracy.headline else []
    timings, hosts = _timings(timed, recipe.bench, run_dir, run_dir / BASELINE)
    peaks = _peaks(recipe.bench) if timed else []
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
        "hosts": hosts,
        "disturbance": hosts.get("local", {}).get("disturbance", {}),
        "peaks": peaks,
        "examples": _examples(accuracy, rows, timings),
    }
    _write(run_dir, content)


def bench_bundles(folders: Sequence[Path], cfg: Config) -> dict[str, Any]:
    """Time bundles side by side; the first one is what `speedup` of the others refers to.

    A folder that holds bundles stands for all of them. `timings` has one row per bundle, tower,
    thread count, scope and host: `path`, `size_bytes`, and the keys of `statistics.summarise`, or
    `unavailable` with the reason. Without accuracy these rows don't belong into a summary.
    """
    found = [bundles.read(folder) for given in folders for folder in bundle_folders(given)]
    timings, hosts = _timings(found, cfg, Path(), found[0].folder)
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "settings": {"bench": cfg.model_dump(mode="json")},
        "hosts": hosts,
        "timings": timings,
    }


def settings(overrides: list[str] | None) -> Config:
    """The settings of a benchmark without a recipe, from `KEY=VALUE` words."""
    problems, raw = Problems(Path("--set")), dict[str, Any]()
    for override in overrides or []:
        apply_override(raw, override.removeprefix("bench."), problems)
    for key in ("threads", "scopes", "hosts"):
        raw |= {key: [raw[key]]} if not isinstance(raw.get(key, []), list) else {}
    cfg = validate(Config, raw, (), problems)
    problems.raise_if_any()
    assert cfg is not None
    return cfg


def render(timings: Rows) -> Table:
    """The rows of `bench_bundles` for a terminal."""
    names = ("bundle", "tower", "p50 ms", "95 % interval", "p90 ms", "speed-up", "peak MB", "MB")
    table = Table(*names, box=None, pad_edge=False)
    for row in timings:
        about = [row["tower"]]
        about += [f"{row['threads']} threads"] if row["threads"] > 1 else []
        about += [str(row[key]) for key in ("scope", "host") if row[key] not in ("model", "local")]
        figures = [row.get("unavailable", ""), "", "", "", ""]
        if "p50_ms" in row:
            low, high = row["p50_ms_ci95"]
            p90, peak = row["p90_ms"], row["peak_memory_bytes"]
            figures = [
                f"{row['p50_ms']:.3f}",
                f"{low:.3f} to {high:.3f}",
                "" if p90 is None else f"{p90:.3f}",
                f"{row['speedup']:.2f}" if "speedup" in row else "",
                "" if peak is None else f"{peak / 1e6:.0f}",
            ]
        table.add_row(row["path"], ", ".join(about), *figures, f"{row['size_bytes'] / 1e6:.2f}")
    return table


def bundle_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a bundle (or nothing we know), else the bundles inside it."""
    inside = sorted(path.parent for path in folder.glob("*/bundle.json"))
    return inside if inside and not (folder / "bundle.json").exists() else [folder]


def _peaks(cfg: Config) -> Rows:
    """The machine's roofline at each thread count, where the recipe wants it."""
    if not cfg.roofline or "local" not in cfg.hosts:
        return []
    return [roofline.peaks(threads) for threads in cfg.threads]


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
    rows = []
    for folder in _stage_folders(run_dir)[:-1]:
        clip = load(folder)
        num_macs = {tower: num_params(clip, tower)["num_macs"] for tower in TOWERS}
        figures = accuracy.on_headline(clip, folder.name)
        rows.append({"folder": folder.name, "num_macs": num_macs, "accuracy": figures})
    return rows


def _timings(
    found: list[Bundle], cfg: Config, root: Path, baseline: Path
) -> tuple[Rows, dict[str, dict[str, Any]]]:
    """Every bundle, tower, thread count, scope and host; what the hosts were like meanwhile."""
    if not found:
        return [], {}
    owners = [
        (bundle, tower, threads, scope, host)
        for host in cfg.hosts
        for threads in cfg.threads
        for scope in cfg.scopes
        for bundle in found
        for tower in TOWERS
    ]
    artifacts = [
        Artifact(b.target, b.folder, t, n, b.queries(t), scope, host, cfg.index_size)
        for b, t, n, scope, host in owners
    ]
    timings, hosts = latency.measure(artifacts, cfg)
    rows = []
    for (bundle, tower, threads, scope, host), timing in zip(owners, timings):
        reference = _reference(timing, timings, baseline)
        rows.append(
            {
                "path": _path(bundle.folder, root),
                "tower": tower,
                "threads": threads,
                "scope": scope,
                "host": host,
                "cores": timing.cores,
                "sha256": bundle.sha256(tower),
                "size_bytes": bundle.size_bytes(tower),
                **summarise(timing, cfg, reference),
                "opened": timing.opened,
                "warmups": timing.warmups,
                "rounds_ms": [samples.round(5).tolist() for samples in timing.rounds],
                "processor_rounds_ms": _without_nan(timing.processor_rounds),
                "process_of_round": timing.process_of_round,
            }
        )
    return rows, hosts


def _without_nan(rounds: list[Samples]) -> list[list[float]]:
    """Processor times; none where the host does not tell them."""
    return [samples.round(5).tolist() for samples in rounds if np.isfinite(samples).all()]


def _reference(timing: Timing, timings: list[Timing], baseline: Path) -> Timing | None:
    """The baseline's timing of the same tower and scope, with as many threads, on the same host."""
    alike = lambda a: (a.tower, a.threads, a.scope, a.host)  # noqa: E731
    for other in timings:
        if other.artifact.folder == baseline and alike(other.artifact) == alike(timing.artifact):
            return other
    return None


def _examples(accuracy: Accuracy, rows: Rows, timings: Rows) -> dict[str, Any]:
    """What the teacher and the fastest student see in a few pictures; empty without classes."""
    students = {row["path"] for row in rows if row["artifact"] == STUDENT}
    timed = [t for t in timings if t["path"] in students and t["tower"] == "image"]
    timed = [t for t in timed if (t["scope"], t["host"]) == ("model", "local")]
    ranked = sorted((t for t in timed if "p50_ms" in t), key=lambda t: t["p50_ms"])
    path = next(iter([t["path"] for t in ranked] or sorted(students)), None)
    teacher = accuracy.headline_vectors.get(TEACHER)
    student = accuracy.headline_vectors.get(path or "")
    if teacher is None or student is None or not len(teacher.classes):
        return {}
    pairs = accuracy.data.split(teacher.split.name)
    seed = accuracy.cfg.seed
    return {"path": path, **examples.compare(teacher, student, pairs, NUM_EXAMPLES, seed)}
