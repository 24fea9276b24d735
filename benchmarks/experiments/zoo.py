"""Models x runtimes x precisions: latency, size and accuracy on this CPU and in Chromium.

    python -m benchmarks.experiments.zoo                      about an hour on two cores
    python -m benchmarks.experiments.zoo --minutes 10         start no model after 10 minutes
    python -m benchmarks.experiments.zoo --models ViT-B/32    only these; others' rows are kept
    python -m benchmarks.experiments.zoo --quick              the embedded teacher, short rounds

All files of one model are timed against each other, interleaved, host by host, one thread. Models
of open_clip have random weights, as nothing is downloaded: latency and size do not depend on them,
and accuracy is not measured. The student is that of RUN (`make quickstart`). What is measured of a
model is kept in runs/zoo, so a stopped experiment goes on; its files are removed unless --keep.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import bundles, latency, machine, roofline
from benchmarks.accuracy import Accuracy, num_params
from benchmarks.experiments.target_sources import TEACHER, open_clip, teacher
from benchmarks.statistics import summarise
from benchmarks.timing import Artifact, Config
from compress import plugin
from compress import recipe as recipes
from compress.atomic import write_json
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.work import Work
from export import Unavailable

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
RESULTS = ROOT / "benchmarks/results/zoo.json"
RUNS = ROOT / "runs/zoo"
RUN = ROOT / "runs/quickstart"
SEED = 0
RANDOM = "not measured: random weights"
UNJUDGED = "not measured in this run"
CFG = Config(
    processes=2, rounds=5, round_seconds=0.3, min_queries=20, patience_seconds=15, max_seconds=240
)
QUICK = Config(processes=1, rounds=2, round_seconds=0.05, min_queries=5, patience_seconds=0)
CELLS: tuple[tuple[str, str, str], ...] = (
    ("onnxruntime", "fp32", "local"),
    ("onnxruntime", "int8", "local"),
    ("openvino", "fp32", "local"),
    ("openvino", "int8", "local"),
    ("executorch", "fp32", "local"),
    ("litert", "fp32", "local"),
    ("web", "fp32", "browser"),
    ("web", "q8", "browser"),
)
"""Exporter, precision, host."""
OWN: dict[str, Any] = {"web": {"page": False, "emoji": False}}
"""Settings beside the precision."""

Rows = list[dict[str, Any]]
Stages = dict[str, dict[str, Any]]


def student(run: Path, stages: Stages) -> Callable[[], Clip]:
    """The run's last training stage, with further stages applied."""

    def load() -> Clip:
        folder = run / "01-distill"
        if not (folder / "model.json").exists():
            raise PocketclipError(f"{folder}: no such model; run make quickstart, or name --run")
        clip, data = plugin.source(str(folder), ROOT), recipes.load(RECIPE).shards()
        for name, settings in stages.items():
            stage = plugin.find(plugin.STAGES, name)
            with tempfile.TemporaryDirectory() as scratch:
                work = Work(clip, clip, data, "cpu", SEED)
                clip = stage.run(work, stage.Config.model_validate(settings), Path(scratch)).clip
        return replace(clip, data=data)

    return load


def models(run: Path) -> dict[str, Callable[[], Clip]]:
    """The seven models that every target is tried on."""
    return {
        TEACHER: teacher,
        "embedded student": student(run, {}),
        "quantized student": student(run, {"quantize": {"num_images": 128}}),
        "token-reduced student": student(
            run, {"prune_tokens": {"method": "guarded", "macs": 0.75}, "exact": {}}
        ),
        "ViT-B/32": open_clip("ViT-B-32"),
        "MobileCLIP2-S0": open_clip("MobileCLIP2-S0"),
        "SigLIP B/16": open_clip("ViT-B-16-SigLIP"),
    }


def exported(clip: Clip, target: str, precision: str, folder: Path) -> str | None:
    """Write one bundle, if it is not there yet -> why there is none."""
    if (folder / "bundle.json").exists():
        return None
    exporter = plugin.find(plugin.EXPORTERS, target)
    try:
        cfg = exporter.Config.model_validate({"precision": precision, **OWN.get(target, {})})
        torch.manual_seed(SEED)
        exporter.write(clip, cfg, folder)
    except (Unavailable, PocketclipError) as reason:
        return str(reason)[:300]
    return None


def measured(name: str, clip: Clip, place: Path, cfg: Config) -> Rows:
    """Export and time all files of one model: a row for each file and tower."""
    rows: Rows = []
    for target, precision, host in CELLS:
        folder = place / f"{target}-{precision}"
        reason = exported(clip, target, precision, folder)
        about = {"model": name, "target": target, "precision": precision, "host": host}
        rows += [{**about, "tower": t, "unavailable": reason} for t in bundles.TOWERS]
        print(f"{name}, {target} {precision}: {reason or 'exported'}", flush=True)
    peaks = [roofline.peaks(1)]
    for host in dict.fromkeys(host for _, _, host in CELLS):
        own = [row for row in rows if row["host"] == host and not row["unavailable"]]
        if own:
            _time(own, clip, place, cfg, peaks)
    for row in rows:
        row["accuracy_note"] = RANDOM if clip.data is None else UNJUDGED
    return rows


def _time(rows: Rows, clip: Clip, place: Path, cfg: Config, peaks: Rows) -> None:
    """Add latency, size and share of the machine's peaks to rows of one host."""
    opened = [bundles.read(place / f"{row['target']}-{row['precision']}") for row in rows]
    artifacts = [
        Artifact(
            row["target"], b.folder, row["tower"], 1, b.queries(row["tower"]), host=row["host"]
        )
        for row, b in zip(rows, opened)
    ]
    timings, hosts = latency.measure(artifacts, cfg)
    for row, bundle, timing in zip(rows, opened, timings):
        row |= {"size_bytes": bundle.size_bytes(row["tower"]), **num_params(clip, row["tower"])}
        figures = summarise(timing, cfg)
        figures.pop("placement", None)
        row |= {"threads": 1, "scope": "model", **figures}
        row["roofline"] = roofline.share(row, row, peaks)
        row["cores_busy"] = hosts[row["host"]].get("disturbance", {}).get("cores_busy")


def _judge(rows: Rows, clip: Clip, place: Path, accuracy: Accuracy) -> None:
    """Add the accuracy of the files themselves, in their own runtime."""
    for target, precision, host in CELLS:
        folder = place / f"{target}-{precision}"
        if not (folder / "bundle.json").exists() or host == "browser":
            continue
        found = accuracy.of_bundle(bundles.read(folder), clip, folder.name)
        for row, figures in zip(bundles.TOWERS, found):
            for own in rows:
                if (own["target"], own["precision"], own["tower"]) == (target, precision, row):
                    own["top1"] = figures["accuracy"].get(accuracy.headline, {}).get("top1")
                    own["accuracy_note"] = None


def kept(name: str, folder: Path) -> Path:
    """Where the rows of a model lie."""
    return folder / name.replace("/", "-").replace(" ", "-") / "rows.json"


def claims(rows: Rows) -> list[dict[str, Any]]:
    """No speed is promised here; that every cell is measured or says why is."""
    cells = {(r["model"], r["target"], r["precision"]) for r in rows if r.get("p50_ms")}
    wanted = {(r["model"], r["target"], r["precision"]) for r in rows}
    value = len(cells) / len(wanted)
    about = {"name": "files measured, of all models, runtimes and precisions", "value": value}
    about |= {"goal": 1.0, "unit": "fraction", "better": "higher", "holds": value >= 1.0}
    return [{**about, "rows": list(range(len(rows)))}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=RUN, help="run folder with the student")
    parser.add_argument("--models", nargs="*", help="names as in the table")
    parser.add_argument("--minutes", type=float, default=600, help="start no model after this time")
    parser.add_argument("--keep", action="store_true", help="leave the exported files in runs/zoo")
    parser.add_argument("--quick", action="store_true", help="writes into runs/zoo-quick")
    given = parser.parse_args()
    known, place = models(given.run), RUNS.with_name("zoo-quick") if given.quick else RUNS
    chosen = [TEACHER] if given.quick else given.models or list(known)
    started = time.monotonic()
    for name in chosen:
        late = time.monotonic() - started > 60 * given.minutes
        if not kept(name, place).exists() and not late:
            _run(name, known[name], place, given)
    rows = _gathered(list(known), place)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.zoo", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": [SEED],
        "rows": rows,
        "claims": claims(rows),
    }
    write_json(place / "zoo.json" if given.quick else RESULTS, result)


def _run(name: str, load: Callable[[], Clip], place: Path, given: argparse.Namespace) -> None:
    """Measure one model and keep its rows."""
    recipe = recipes.load(RECIPE, ["evaluate.splits=[held_out_style]"])
    clip, path = load(), kept(name, place)
    rows = measured(name, clip, path.parent, QUICK if given.quick else CFG)
    write_json(path, rows)
    if clip.data is not None and not given.quick:
        accuracy = Accuracy(recipe.shards(), recipe.evaluate)
        accuracy.of_torch(teacher(), "teacher", "teacher")
        _judge(rows, clip, path.parent, accuracy)
        write_json(path, rows)
    for folder in [] if given.keep else path.parent.glob("*-*/"):
        shutil.rmtree(folder)


def _gathered(names: list[str], place: Path) -> Rows:
    """All models' rows; what was left out is a row with its reason."""
    rows: Rows = []
    for name in names:
        path = kept(name, place)
        if path.exists():
            rows += json.loads(path.read_text())
            continue
        for target, precision, host in CELLS:
            about = {"model": name, "target": target, "precision": precision, "host": host}
            why = "not run"
            rows += [{**about, "tower": t, "unavailable": why} for t in bundles.TOWERS]
    return rows


if __name__ == "__main__":
    main()
