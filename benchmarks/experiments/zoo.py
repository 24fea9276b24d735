"""Models x runtimes x precisions: latency, size and accuracy on this CPU and in Chromium.

    python -m benchmarks.experiments.zoo                      about 40 minutes on one core
    python -m benchmarks.experiments.zoo --minutes 10         start no model after 10 minutes
    python -m benchmarks.experiments.zoo --models ViT-B/32    only these; others' rows are kept
    python -m benchmarks.experiments.zoo --prepare            write the files, time nothing
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
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import bundles, latency, machine, roofline
from benchmarks.accuracy import num_params
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
from compress.embeddings import embed, headline_split
from compress.errors import PocketclipError
from compress.evaluate import measure
from compress.fold import fold
from compress.twin import float_twin
from export import Unavailable

RESULTS = ROOT / "benchmarks/results/zoo.json"
RUNS = ROOT / "runs/zoo"
MODELS = tuple(name for name in SOURCES if name != "ViT-B/16")
"""The seven models that every target is tried on."""
RANDOM = "not measured: random weights"
UNJUDGED = "not measured yet"
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
    """Write one bundle, if it is not there yet -> why there is none.

    Schemes that an exporter does not know are left out, as in a run.
    """
    if (folder / "bundle.json").exists():
        return None
    exporter = plugin.find(plugin.EXPORTERS, target)
    clip = clip if getattr(exporter, "HONOURS_SCHEME", False) else float_twin(clip)
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


def prepared(name: str, clip: Clip, place: Path) -> Rows:
    """Export all files of one model: their rows, with the reason where there is no file."""
    rows = cells(name)
    for target, precision, _ in CELLS:
        reason = exported(clip, target, precision, place / f"{target}-{precision}")
        print(f"{name}, {target} {precision}: {reason or 'exported'}", flush=True)
        for row in rows:
            if (row["target"], row["precision"]) == (target, precision):
                row["unavailable"] = reason
    return rows


def measured(name: str, clip: Clip, place: Path, cfg: Config) -> Rows:
    """Export and time all files of one model: their rows, and one with the machine's peaks."""
    rows = prepared(name, clip, place)
    peaks = roofline.peaks(THREADS)
    for host in dict.fromkeys(host for _, _, host in CELLS):
        for tower in bundles.TOWERS:  # large towers together would fill the memory
            chosen = [r for r in rows if (r["host"], r["tower"]) == (host, tower)]
            time_([row for row in chosen if row["unavailable"] is None], clip, place, cfg)
    return [*rows, {"task": "peaks", "model": name, "cpu": machine.short(), **peaks}]


def time_(rows: Rows, clip: Clip, place: Path, cfg: Config) -> None:
    """Add latency and size to rows of one host and tower."""
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
        row["cpu"] = machine.short()
        row["cores_busy"] = hosts[row["host"]].get("disturbance", {}).get("cores_busy")


def judge_(rows: Rows, clip: Clip, place: Path, save: Callable[[], None]) -> None:
    """Add the accuracy of the files themselves, in their own runtime, saving after each."""
    cfg = recipes.load(RECIPE).evaluate.model_copy(update={"resamples": 100})
    assert clip.data is not None
    headline = headline_split(clip.data, cfg)
    for target, precision, _ in CELLS:
        own = [r for r in rows if (r.get("target"), r.get("precision")) == (target, precision)]
        if not own or own[0].get("accuracy_note") != UNJUDGED:
            continue
        bundle = bundles.read(place / f"{target}-{precision}")
        found = embed(bundle.encoder(THREADS), bundle, clip.data, cfg, [headline], target)
        for row in own:
            row |= {"top1": measure(found[headline], cfg)["top1"], "accuracy_note": None}
        save()


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
    parser.add_argument("--prepare", action="store_true", help="write the files, time nothing")
    parser.add_argument("--keep", action="store_true", help="leave the exported files in runs/zoo")
    parser.add_argument("--quick", action="store_true", help="writes into runs/zoo-quick")
    given = parser.parse_args()
    place = RUNS.with_name("zoo-quick") if given.quick else RUNS
    chosen = [TEACHER] if given.quick else given.models or list(MODELS)
    started = time.monotonic()
    for name in chosen:
        late = time.monotonic() - started > 60 * given.minutes
        if finished(name, place) or late:
            continue
        if given.prepare:
            prepared(name, model(name, place), kept(name, place).parent)
        else:
            run(name, place, given.quick, given.keep)
    if given.prepare:
        return
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


def model(name: str, place: Path) -> Clip:
    """A model with the emoji data: random weights are calibrated on pictures too."""
    clip = opened(name, kept(name, place).parent / "model")
    data = recipes.load(RECIPE).shards()
    if not trained(clip):
        data = replace(data, evaluate={})  # nothing is right or wrong of random weights
    return replace(fold(clip), data=data)


def run(name: str, place: Path, quick: bool, keep: bool) -> None:
    """Measure one model, or what is missing of it, and keep its rows."""
    path, clip = kept(name, place), model(name, place)
    if not path.exists():
        rows = measured(name, clip, path.parent, QUICK if quick else CFG)
        for row in (row for row in rows if row.get("p50_ms")):
            row["accuracy_note"] = UNJUDGED if trained(clip) else RANDOM
        write_json(path, rows)
    rows = json.loads(path.read_text())
    if not quick:
        judge_(rows, clip, path.parent, lambda: write_json(path, rows))
    for folder in [] if keep else path.parent.glob("*-*/"):
        shutil.rmtree(folder)


def finished(name: str, place: Path) -> bool:
    """Whether a model is timed, and its files judged."""
    path = kept(name, place)
    rows: Rows = json.loads(path.read_text()) if path.exists() else []
    return bool(rows) and all(row.get("accuracy_note") != UNJUDGED for row in rows)


def gathered(place: Path) -> Rows:
    """All models' rows with their shares of the machine's peaks; what was left out is a row with
    its reason.
    """
    rows: Rows = []
    for name in MODELS:
        path = kept(name, place)
        found: Rows = json.loads(path.read_text()) if path.exists() else cells(name)
        peaks = [row for row in found if row.get("task") == "peaks"]
        for row in (row for row in found if row.get("processor_p50_ms")):
            # The peaks are the best of several tries: waiting for a core must not count here.
            spent = {**row, "p50_ms": row["processor_p50_ms"]}
            row["roofline"] = roofline.share(row, spent, peaks)
        rows += found
    return rows


if __name__ == "__main__":
    main()
