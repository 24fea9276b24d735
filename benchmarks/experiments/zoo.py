"""Models x runtimes x precisions: latency, size and accuracy on this CPU and in Chromium.

    python -m benchmarks.experiments.zoo                      about 40 minutes on one core
    python -m benchmarks.experiments.zoo --minutes 10         start no model after 10 minutes
    python -m benchmarks.experiments.zoo --models ViT-B/32    only these; others' rows are kept
    python -m benchmarks.experiments.zoo --quick              the embedded teacher, short rounds

All files of one model and tower are timed against each other, interleaved, host by host, one
thread; the machine's peaks are measured beside them. Models of open_clip have random weights, as
nothing is downloaded: latency and size do not depend on them, and accuracy is not measured. The
students are those of `target_sources.py` (`make quickstart` first). What is measured of a model is
kept in runs/zoo, so a stopped experiment goes on; its files are removed unless --keep.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import bundles, latency, machine, roofline
from benchmarks.accuracy import Accuracy, num_params
from benchmarks.experiments.target_sources import (
    RECIPE,
    ROOT,
    SEED,
    SOURCES,
    TEACHER,
    opened,
    trained,
)
from benchmarks.statistics import summarise
from benchmarks.timing import Artifact, Config
from compress import plugin
from compress import recipe as recipes
from compress.atomic import write_json
from compress.clip import Clip
from compress.errors import PocketclipError
from export import Unavailable

RESULTS = ROOT / "benchmarks/results/zoo.json"
RUNS = ROOT / "runs/zoo"
MODELS = tuple(name for name in SOURCES if name != "ViT-B/16")
"""The seven models that every target is tried on."""
RANDOM = "not measured: random weights"
THREADS = 1
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

Row = dict[str, Any]
Rows = list[Row]


def bundle_name(row: Row) -> str:
    """The folder of a row's file, beside those of the same model."""
    return f"{row['target']}-{row['precision']}"


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


def cells(name: str) -> Rows:
    """A row for each file and tower of a model, nothing known of it yet."""
    keys = ("target", "precision", "host")
    return [
        {"model": name, **dict(zip(keys, cell)), "tower": tower, "unavailable": "not run"}
        for cell in CELLS
        for tower in bundles.TOWERS
    ]


def measured(name: str, clip: Clip, place: Path, cfg: Config) -> Rows:
    """Export and time all files of one model: their rows, and one with the machine's peaks."""
    rows = cells(name)
    for target, precision, _ in CELLS:
        reason = exported(clip, target, precision, place / f"{target}-{precision}")
        print(f"{name}, {target} {precision}: {reason or 'exported'}", flush=True)
        for row in rows:
            if (row["target"], row["precision"]) == (target, precision):
                row["unavailable"] = reason
    peaks = roofline.peaks(THREADS)
    for host in dict.fromkeys(host for _, _, host in CELLS):
        for tower in bundles.TOWERS:  # large towers together would fill the memory
            chosen = [r for r in rows if (r["host"], r["tower"]) == (host, tower)]
            time_([row for row in chosen if row["unavailable"] is None], clip, place, cfg, [peaks])
    return [*rows, {"task": "peaks", "model": name, **peaks}]


def time_(rows: Rows, clip: Clip, place: Path, cfg: Config, peaks: Rows) -> None:
    """Add latency, size and share of the machine's peaks to rows of one host and tower."""
    if not rows:
        return
    found = [bundles.read(place / bundle_name(row)) for row in rows]
    artifacts = [
        Artifact(
            row["target"],
            b.folder,
            row["tower"],
            THREADS,
            b.queries(row["tower"]),
            host=row["host"],
        )
        for row, b in zip(rows, found)
    ]
    timings, hosts = latency.measure(artifacts, cfg)
    for row, bundle, timing in zip(rows, found, timings):
        row |= {"size_bytes": bundle.size_bytes(row["tower"]), **num_params(clip, row["tower"])}
        figures = summarise(timing, cfg)
        figures.pop("placement", None)
        row |= {"sha256": bundle.sha256(row["tower"]), "threads": THREADS, "scope": "model"}
        row |= figures
        row["roofline"] = roofline.share(row, row, peaks)
        row["cores_busy"] = hosts[row["host"]].get("disturbance", {}).get("cores_busy")


def judge_(rows: Rows, clip: Clip, place: Path, accuracy: Accuracy) -> None:
    """Add the accuracy of the files themselves, in their own runtime."""
    for target, precision, _ in CELLS:
        own = [r for r in rows if (r.get("target"), r.get("precision")) == (target, precision)]
        folder = place / f"{target}-{precision}"
        if not (folder / "bundle.json").exists():
            continue
        [figures, _] = accuracy.of_bundle(bundles.read(folder), clip, folder.name)
        top1 = figures["accuracy"].get(accuracy.headline, {}).get("top1")
        for row in own:
            row |= {"top1": top1, "accuracy_note": figures["unavailable"]}


def kept(name: str, folder: Path) -> Path:
    """Where the rows of a model lie."""
    return folder / name.replace("/", "-").replace(" ", "-") / "rows.json"


def claims(rows: Rows) -> list[Row]:
    """No speed is promised here; that every cell is measured or says why is."""
    files = [index for index, row in enumerate(rows) if "tower" in row]
    value = sum(rows[index].get("p50_ms") is not None for index in files) / len(files)
    about = {"name": "towers measured, of all models, runtimes and precisions", "value": value}
    about |= {"goal": 1.0, "unit": "fraction", "better": "higher", "holds": value >= 1.0}
    return [{**about, "rows": files}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, help="names as in the table")
    parser.add_argument("--minutes", type=float, default=600, help="start no model after this time")
    parser.add_argument("--keep", action="store_true", help="leave the exported files in runs/zoo")
    parser.add_argument("--quick", action="store_true", help="writes into runs/zoo-quick")
    given = parser.parse_args()
    place = RUNS.with_name("zoo-quick") if given.quick else RUNS
    chosen = [TEACHER] if given.quick else given.models or list(MODELS)
    started = time.monotonic()
    for name in chosen:
        late = time.monotonic() - started > 60 * given.minutes
        if not kept(name, place).exists() and not late:
            run(name, place, given.quick, given.keep)
    rows = gathered(place)
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


def run(name: str, place: Path, quick: bool, keep: bool) -> None:
    """Measure one model and keep its rows."""
    recipe = recipes.load(RECIPE, ["evaluate.splits=[held_out_style]"])
    path = kept(name, place)
    clip = opened(name, path.parent / "model")
    clip = replace(clip, data=recipe.shards())  # random weights are calibrated on pictures too
    rows = measured(name, clip, path.parent, QUICK if quick else CFG)
    if not trained(clip):
        for row in rows:
            row["accuracy_note"] = RANDOM
    elif not quick:
        accuracy = Accuracy(recipe.shards(), recipe.evaluate)
        accuracy.of_torch(SOURCES[TEACHER](), "teacher", "teacher")
        judge_(rows, clip, path.parent, accuracy)
    write_json(path, rows)
    for folder in [] if keep else path.parent.glob("*-*/"):
        shutil.rmtree(folder)


def gathered(place: Path) -> Rows:
    """All models' rows; what was left out is a row with its reason."""
    rows: Rows = []
    for name in MODELS:
        path = kept(name, place)
        rows += json.loads(path.read_text()) if path.exists() else cells(name)
    return rows


if __name__ == "__main__":
    main()
