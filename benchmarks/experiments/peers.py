"""What users would reach for instead: the same teacher, data and metrics, in one interleaved run.

    python -m benchmarks.experiments.peers --ours RUN...     finished run folders of ours
    python -m benchmarks.experiments.peers --prepare         all but the timing, to be gone on with
    python -m benchmarks.experiments.peers --quick           fewer pictures, rounds and peers

Each peer compresses the embedded teacher in an environment of its own (`benchmarks.peers`); what
it wrote and the exports of RUN are then evaluated and timed together, in the same runtimes. A peer
that fails is a row with its reason. What is done is kept in runs/peers.
"""

import argparse
import json
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import bundles, latency, machine
from benchmarks.accuracy import Accuracy
from benchmarks.peers import _process, _training, environment, task
from benchmarks.statistics import summarise
from benchmarks.timing import Artifact, Config
from compress import plugin
from compress import recipe as recipes
from compress.atomic import write_json
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.work import Data, Work

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
RESULTS = ROOT / "benchmarks/results/peers.json"
OURS = ROOT / "runs/quickstart"
GOAL = 2.5
LIMIT_SECONDS = 600.0
"""Time that a peer has to compress both towers."""
JUDGED = ("top1", "top1_ci95", "image_to_text_r1", "text_to_image_r10")
LEFT_OUT = ("onnx", "open_clip-fp16", "open_clip-fp32")
"""Exports of ours that are no one's choice for speed."""
QUICK_PEERS = ("ort_dynamic", "ort_static")
QUICK = Config(processes=1, rounds=4, patience_seconds=0)
Rows = list[dict[str, Any]]


def compressed(name: str, place: Path) -> dict[str, Any]:
    """Let one peer do its work, if it has not yet -> seconds and lines, or why there is nothing."""
    out = place / name / "artifact"
    found = out / task.RESULT
    if not (out / "bundle.json").exists():
        try:
            python = environment.make(name)
        except PocketclipError as reason:
            return {"peer": name, "unavailable": str(reason)[:300]}
        shutil.rmtree(out, ignore_errors=True)
        command = [str(python), "-m", "benchmarks.peers.task", name, str(place / "task"), str(out)]
        log = place / name / "compress.log"
        ended = _process.run(command, ROOT, log, found, LIMIT_SECONDS)
        if not found.exists():
            return {"peer": name, "unavailable": ended or "wrote nothing"}
        result = json.loads(found.read_text())
        write_json(found, result | ({"note": ended} if ended else {}))
        task.as_bundle(name, place / "task", out)
    return {"peer": name, "folder": out, **json.loads(found.read_text())}


class Judge:
    """Accuracy of bundles, kept by the hashes of their files."""

    def __init__(self, recipe: recipes.Recipe, clip: Clip, data: Data, place: Path) -> None:
        self.path, self.clip, self.data, self.cfg = (
            place / "accuracy.json",
            clip,
            data,
            recipe.evaluate,
        )
        self.kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.accuracy: Accuracy | None = None

    def __call__(self, bundle: bundles.Bundle) -> dict[str, Any]:
        """Figures on the headline split."""
        images = self.cfg.num_images
        key = f"{bundle.sha256('image')} {bundle.sha256('text')} {images}"
        if key not in self.kept:
            if self.accuracy is None:
                self.accuracy = Accuracy(self.data, self.cfg)
                self.accuracy.of_torch(self.clip, "teacher", "teacher")
            [image, _] = self.accuracy.of_bundle(bundle, self.clip, key)
            found = image["accuracy"].get(self.accuracy.headline, {})
            self.kept[key] = {name: found.get(name) for name in JUDGED}
            write_json(self.path, self.kept)
        figures: dict[str, Any] = self.kept[key]
        return figures


def rows(found: Rows, cfg: Config, judge: Judge) -> tuple[Rows, dict[str, Any]]:
    """Accuracy and latency of every artifact, a row for each tower; how busy the machine was."""
    opened = [bundles.read(about["folder"], about["peer"]) for about in found]
    figures = [judge(bundle) for bundle in opened]
    artifacts = [
        Artifact(b.target, b.folder, tower, 1, b.queries(tower))
        for b in opened
        for tower in bundles.TOWERS
    ]
    timings, hosts = latency.measure(artifacts, cfg)
    result = []
    for place, timing in enumerate(timings):
        about, bundle = found[place // 2], opened[place // 2]
        tower, baseline = bundles.TOWERS[place % 2], timings[place % 2]
        measured = summarise(timing, cfg, baseline)
        measured.pop("placement", None)
        result.append(
            {
                "artifact": about["peer"],
                "ours": about["ours"],
                "target": bundle.target,
                "precision": bundle.precision,
                "tower": tower,
                "size_bytes": bundle.size_bytes(tower),
                **figures[place // 2],
                "lines": about.get("lines"),
                "compress_seconds": about.get("seconds"),
                "compress_processor_seconds": about.get("processor_seconds"),
                "note": about.get("note"),
                **measured,
            }
        )
    return result, hosts["local"]["disturbance"]


def timed(found: Rows, cfg: Config, judge: Judge, place: Path) -> tuple[Rows, dict[str, Any]]:
    """`rows`, kept as long as the artifacts are the same ones."""
    path, names = place / "timed.json", [about["peer"] for about in found]
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("names") != names:
        measured, disturbance = rows(found, cfg, judge)
        kept = {"names": names, "rows": measured, "disturbance": disturbance}
        write_json(path, kept)
    return kept["rows"], kept["disturbance"]


def claims(rows: Rows) -> Rows:
    """Each peer's image tower against our fastest one of equal or better top-1.

    The first claim is the smallest of these ratios, so that it holds whichever peer is the best;
    then one for each peer. A peer that none of ours equals in top-1 counts as 0.
    """
    timed = [i for i, r in enumerate(rows) if r.get("tower") == "image" and r.get("p50_ms")]
    own = [i for i in timed if rows[i]["ours"]]
    found = []
    for peer in timed:
        if rows[peer]["ours"] or rows[peer]["artifact"] == "teacher":
            continue
        equal = [i for i in own if rows[i]["top1"] >= rows[peer]["top1"]]
        best = min(equal, key=lambda i: rows[i]["p50_ms"], default=None)
        value = 0.0 if best is None else rows[peer]["p50_ms"] / rows[best]["p50_ms"]
        name = f"our fastest image tower of at least its top-1, over {rows[peer]['artifact']}"
        found.append(_claim(name, value, [peer] if best is None else [peer, best]))
    if not found:
        return []
    least = min(found, key=lambda claim: claim["value"])
    return [
        {**least, "name": "our fastest image tower of equal or better top-1, worst peer"},
        *found,
    ]


def _claim(name: str, value: float, rows: list[int]) -> dict[str, Any]:
    about = {"name": name, "value": value, "goal": GOAL, "unit": "ratio", "better": "higher"}
    return {**about, "holds": bool(value >= GOAL), "rows": rows}


def training(clip: Clip, data: Data, place: Path, quick: bool) -> list[dict[str, Any]]:
    """Samples per second of open_clip's trainer and of ours, kept once measured."""
    path = place / "training.json"
    if not path.exists():
        student = plugin.source("new:student.json", RECIPE.parent)
        size, steps, rounds = (32, 2, 1) if quick else (128, 3, 5)
        work = Work(clip, clip, data, seed=task.SEED)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        write_json(
            path,
            _training.measure(student, work, place / "training", size, steps, rounds, task.SEED),
        )
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def ours(folders: list[Path]) -> Rows:
    """The exports of our runs, named after their recipes."""
    return [
        {"peer": f"ours: {run.name}, {path.parent.name}", "ours": True, "folder": path.parent}
        for run in folders
        for path in sorted(run.glob("export/*/bundle.json"))
        if path.parent.name not in LEFT_OUT
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ours", type=Path, nargs="*", default=[OURS], help="our run folders")
    parser.add_argument("--prepare", action="store_true", help="compress and judge, time nothing")
    parser.add_argument("--no-training", action="store_true", help="leave the trainers out")
    parser.add_argument("--quick", action="store_true", help="writes into runs/peers-quick")
    given = parser.parse_args()
    place = ROOT / "runs" / ("peers-quick" if given.quick else "peers")
    overrides = ["evaluate.splits=[held_out_style]"]
    overrides += ["evaluate.num_images=64"] if given.quick else []
    recipe = recipes.load(RECIPE, overrides)
    clip, data = plugin.source(recipe.model, recipe.folder), recipe.shards()
    task.prepare(clip, data, place / "task")
    names = QUICK_PEERS if given.quick else environment.names()
    peers = [compressed(name, place) | {"ours": False} for name in names]
    found: Rows = [{"peer": "teacher", "ours": False, "folder": place / "task" / "onnx"}]
    found += [peer for peer in peers if "folder" in peer] + ours(given.ours)
    judge = Judge(recipe, clip, data, place)
    if given.prepare:
        for about in found:
            print(about["peer"], judge(bundles.read(about["folder"], about["peer"])), flush=True)
        return
    measured, disturbance = timed(found, QUICK if given.quick else Config(), judge, place)
    measured += [] if given.no_training else training(clip, data, place, given.quick)
    measured += [peer | {"artifact": peer["peer"]} for peer in peers if "unavailable" in peer]
    _write(given.quick, place, measured, disturbance)
    for row in measured:
        print(f"{row['artifact']} {row.get('tower', '')}: {_told(row)}")


def _write(quick: bool, place: Path, measured: Rows, disturbance: dict[str, Any]) -> None:
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.peers", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions() | task.versions(),
        "disturbance": disturbance,
        "seeds": [task.SEED],
        "rows": measured,
        "claims": claims(measured),
    }
    write_json(place / "peers.json" if quick else RESULTS, result)


def _told(row: dict[str, Any]) -> str:
    if "samples_per_second" in row:
        return f"{row['samples_per_second']:.0f} samples/s"
    if row.get("p50_ms") is None:
        return str(row["unavailable"])
    return f"{row['p50_ms']:.3f} ms, top-1 {row['top1']:.3f}"


if __name__ == "__main__":
    main()
