"""What users would reach for instead: the same teacher, data and metrics, in one interleaved run.

    python -m benchmarks.experiments.peers --ours RUN    RUN: a finished run folder of ours
    python -m benchmarks.experiments.peers --quick       fewer pictures, rounds and peers

Each peer compresses the embedded teacher in an environment of its own (`benchmarks.peers`); what
it wrote and the exports of RUN are then evaluated and timed together, in the same runtimes. A peer
that fails is a row with its reason. What is done is kept in runs/peers.
"""

import argparse
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import bundles, latency, machine
from benchmarks.accuracy import Accuracy
from benchmarks.peers import _process, _training, environment, task
from benchmarks.statistics import summarise
from benchmarks.timing import Artifact, Config, Timing
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
QUICK_PEERS = ("ort_dynamic", "ort_static")
QUICK = Config(processes=1, rounds=4, patience_seconds=0)


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


def rows(found: list[dict[str, Any]], cfg: Config, accuracy: Accuracy, clip: Any) -> Any:
    """Accuracy and latency of every artifact, a row for each tower."""
    opened = [(about, bundles.read(about["folder"], about["peer"])) for about in found]
    timed = [
        Timing(Artifact(b.target, b.folder, tower, 1, b.queries(tower)), [])
        for _, b in opened
        for tower in bundles.TOWERS
    ]
    timings, hosts = latency.measure([t.artifact for t in timed], cfg)
    result = []
    for n, (about, bundle) in enumerate(opened):
        own = accuracy.of_bundle(bundle, clip, bundle.folder.name + bundle.artifact)
        for tower, row in zip(bundles.TOWERS, own):
            measured = row["accuracy"].get(accuracy.headline, {})
            place = 2 * n + bundles.TOWERS.index(tower)
            baseline = timings[bundles.TOWERS.index(tower)]
            figures = summarise(timings[place], cfg, baseline)
            figures.pop("placement", None)
            result.append(
                {
                    "artifact": about["peer"],
                    "ours": about["ours"],
                    "target": bundle.target,
                    "precision": bundle.precision,
                    "tower": tower,
                    "size_bytes": bundle.size_bytes(tower),
                    "top1": measured.get("top1"),
                    "top1_ci95": measured.get("top1_ci95"),
                    "image_to_text_r1": measured.get("image_to_text_r1"),
                    "lines": about.get("lines"),
                    "compress_seconds": about.get("seconds"),
                    "note": about.get("note"),
                    **figures,
                }
            )
    return result, hosts["local"]["disturbance"]


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our fastest image tower that is as accurate as the fastest peer's, against that peer's.

    None where no tower of ours is as accurate.
    """
    measured = [
        i
        for i, row in enumerate(rows)
        if row.get("tower") == "image" and row.get("p50_ms") and row["artifact"] != "teacher"
    ]
    peers = [i for i in measured if not rows[i]["ours"]]
    if not peers:
        return []
    best = min(peers, key=lambda i: rows[i]["p50_ms"])
    own = [j for j in measured if rows[j]["ours"] and rows[j]["top1"] >= rows[best]["top1"]]
    if not own:
        return []
    fastest = min(own, key=lambda j: rows[j]["p50_ms"])
    value = rows[best]["p50_ms"] / rows[fastest]["p50_ms"]
    return [
        {
            "name": "our best image tower over the fastest peer's, at equal or better top-1",
            "value": value,
            "goal": GOAL,
            "unit": "ratio",
            "better": "higher",
            "holds": bool(value >= GOAL),
            "rows": [best, fastest],
        }
    ]


def training(clip: Clip, data: Data, place: Path, quick: bool) -> list[dict[str, Any]]:
    """Samples per second of open_clip's trainer and of ours, kept once measured."""
    path = place / "training.json"
    if not path.exists():
        student = plugin.source("new:student.json", RECIPE.parent)
        size, steps, rounds = (32, 2, 1) if quick else (256, 4, 5)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ours", type=Path, default=OURS, help="run folder with our exports")
    parser.add_argument("--quick", action="store_true", help="writes into runs/peers-quick")
    given = parser.parse_args()
    place = ROOT / "runs" / ("peers-quick" if given.quick else "peers")
    overrides = ["evaluate.splits=[held_out_style]"]
    overrides += ["evaluate.num_images=64"] if given.quick else []
    recipe = recipes.load(RECIPE, overrides)
    clip = plugin.source(recipe.model, recipe.folder)
    data = recipe.shards()
    task.prepare(clip, data, place / "task")
    found = [{"peer": "teacher", "ours": False, "folder": place / "task" / "onnx"}]
    for folder in sorted(given.ours.glob("export/*/bundle.json")):
        found.append({"peer": f"ours: {folder.parent.name}", "ours": True, "folder": folder.parent})
    names = QUICK_PEERS if given.quick else environment.names()
    peers = [compressed(name, place) | {"ours": False} for name in names]
    found += [peer for peer in peers if "folder" in peer]
    accuracy = Accuracy(data, recipe.evaluate)
    accuracy.of_torch(clip, "teacher", "teacher")
    measured, disturbance = rows(found, QUICK if given.quick else Config(), accuracy, clip)
    measured += training(clip, data, place, given.quick)
    measured += [peer | {"artifact": peer["peer"]} for peer in peers if "unavailable" in peer]
    result = {
        "command": "python -m benchmarks.experiments.peers" + (" --quick" if given.quick else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "disturbance": disturbance,
        "seeds": [task.SEED],
        "rows": measured,
        "claims": claims(measured),
    }
    write_json(place / "peers.json" if given.quick else RESULTS, result)
    for row in measured:
        print(f"{row['artifact']} {row.get('tower', '')}: {_told(row)}")


def _told(row: dict[str, Any]) -> str:
    if "samples_per_second" in row:
        return f"{row['samples_per_second']:.0f} samples/s"
    if row.get("p50_ms") is None:
        return str(row["unavailable"])
    return f"{row['p50_ms']:.3f} ms, top-1 {row['top1']:.3f}"


if __name__ == "__main__":
    main()
