"""What doing less costs and gains: tokens, exact passes, a smaller vocabulary.

    python -m benchmarks.experiments.reduction            about 40 minutes on two quiet cores
    python -m benchmarks.experiments.reduction --quick    a few minutes; shows only that it works

Parts, each kept in runs/reduction once measured, so that a stopped experiment continues: accuracy
of every method on two held-out tasks; recovery by recipes/emoji/tokens_recovery.yaml; latency of
towers with random weights; exactness and bytes. `--parts` runs some of them; rows of the others
stay as they are in the results file.
"""

import argparse
import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import compress.clip
from benchmarks import machine
from benchmarks.experiments import _reduction_accuracy as accuracy
from benchmarks.experiments import _reduction_exact as exactness
from benchmarks.experiments import _reduction_latency as latency
from compress.atomic import write_json
from compress.batches import embed_names

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/reduction.json"
RUNS, QUICK = ROOT / "runs/reduction", ROOT / "runs/reduction-quick"
RECIPE = ROOT / "recipes/emoji/tokens_recovery.yaml"
PARTS = ("accuracy", "recovery", "latency", "exact")
DEFAULT = "guarded"
"""The method that `prune_tokens` takes if none is named."""
BEST = "exact + guarded 0.45"
"""The variant whose speed the claims are about."""

Rows = list[dict[str, Any]]


def measure(
    part: str, folder: Path, quick: bool, models: list[str], arms: list[str] | None
) -> Rows:
    """The rows of one part."""
    tasks = accuracy.Tasks(64 if quick else None)
    if part == "accuracy":
        return accuracy.measure(folder / "accuracy" / tasks.digest, tasks, quick, arms)
    if part == "latency":
        rows = latency.of_arms(folder / "arms" / tasks.digest, tasks.teacher, accuracy.arms(quick))
        return rows + latency.measure(folder / "latency", models, tasks.teacher.tokenizer, quick)
    if part == "exact":
        return exactness.measure(tasks.teacher, tasks.data)
    return _recovery(folder, tasks, quick)


def _recovery(folder: Path, tasks: accuracy.Tasks, quick: bool) -> Rows:
    """The recovery recipe's student on both tasks, and the teacher beside it."""
    out = folder / "recovery" / tasks.digest
    command = [sys.executable, "-m", "compress", "run", str(RECIPE), "--out", str(out)]
    command += ["--set", "export=[]", "--set", "evaluate.num_images=32"]
    for setting in ("patience_seconds=0", "processes=1", "rounds=2", "min_queries=5"):
        command += ["--set", f"bench.{setting}"]  # another part times
    if quick:
        for n in (1, 3, 5):
            command += ["--set", f"stages[{n}].steps=2"]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = []
    for artifact, stage in (("teacher", "teacher"), ("student", "05-distill")):
        clip = compress.clip.load(out / stage)
        names = [name for _, name in tasks.data.classes]
        classes = embed_names(clip, names, list(accuracy.TEMPLATES))
        for split in accuracy.SPLITS:
            right = tasks.top1(clip, split, classes)
            row: dict[str, Any] = {"part": "recovery", "arm": "recovered 0.60", "split": split}
            row |= {"artifact": artifact, "num_images": len(right), "top1": float(right.mean())}
            rows.append(row)
    return rows


def claims(rows: Rows) -> list[dict[str, Any]]:
    """The issue's figures, each with the rows it comes from; a part that wasn't run makes none."""
    found = [
        _kept("default, 0.75 of the multiply-adds, no training: worst loss", rows),
        _recovered(rows),
        _regions(rows),
        _speed("B/16", rows),
        _speed("L/14@336", rows),
        *[_near_ideal(target, rows) for target in ("onnxruntime", "openvino")],
        _largest("exact passes: largest change of an embedding", "exact", 1e-4, "absolute", rows),
        _vocabulary(rows),
    ]
    return [claim for claim in found if claim is not None]


def _pick(rows: Rows, **wanted: Any) -> list[int]:
    return [n for n, row in enumerate(rows) if all(row.get(k) == v for k, v in wanted.items())]


def _claim(
    name: str, value: float, goal: float, unit: str, better: str, which: list[int]
) -> dict[str, Any]:
    holds = value >= goal if better == "higher" else value <= goal
    return {
        "name": name,
        "value": value,
        "goal": goal,
        "unit": unit,
        "better": better,
        "holds": bool(holds),
        "rows": which,
    }


def _kept(name: str, rows: Rows) -> dict[str, Any] | None:
    """Top-1 of the full tower less that of the default schedule, the worse of both tasks."""
    whole = _pick(rows, part="accuracy", arm="none")
    fewer = _pick(rows, part="accuracy", arm=f"{accuracy.EXACT}{DEFAULT} 0.75")
    if not whole or not fewer:
        return None
    full = {rows[n]["split"]: rows[n]["top1"] for n in whole}
    worst = max(full[rows[n]["split"]] - rows[n]["top1"] for n in fewer)
    return _claim(name, worst, 0.005, "fraction", "lower", whole + fewer)


def _recovered(rows: Rows) -> dict[str, Any] | None:
    which = _pick(rows, part="recovery")
    if not which:
        return None
    top1 = {(rows[n]["artifact"], rows[n]["split"]): rows[n]["top1"] for n in which}
    splits = {split for _, split in top1}
    worst = max(top1["teacher", s] - top1["student", s] for s in splits)
    name = "default, 0.6 of the multiply-adds, after recovery: worst loss"
    return _claim(name, worst, 0.005, "fraction", "lower", which)


def _regions(rows: Rows) -> dict[str, Any] | None:
    which = [n for n in _pick(rows, part="accuracy", method=DEFAULT) if rows[n]["macs"] >= 0.5]
    if not which:
        return None
    worst = max(rows[n]["worst_lost_regions"] for n in which)
    name = "default: largest share of a picture's regions that no token holds"
    return _claim(name, worst, 0.0, "fraction", "lower", which)


def _speed(model: str, rows: Rows) -> dict[str, Any] | None:
    """Processor time of ONNX Runtime's float32 over that of the fastest reduced int8 file."""
    base = _pick(
        rows, part="latency", model=model, variant="full", target="onnxruntime", precision="fp32"
    )
    fast = _pick(rows, part="latency", model=model, variant=BEST, precision="int8")
    if not base or not fast:
        return None
    best = min(fast, key=lambda n: rows[n]["processor_p50_ms"])
    ratio = rows[base[0]]["processor_p50_ms"] / rows[best]["processor_p50_ms"]
    name = f"{model}: int8 + tokens + exact passes over ONNX Runtime fp32, 1 thread"
    return _claim(name, ratio, 7.0, "ratio", "higher", [*base, best])


def _near_ideal(target: str, rows: Rows) -> dict[str, Any] | None:
    """Worst of all schedules: speed-up in int8 over the same file whole, by 1 / share of MACs."""
    found: list[tuple[float, list[int]]] = []
    for model in ("B/16", "L/14@336"):
        own = _pick(rows, part="latency", model=model, target=target, precision="int8")
        whole = [n for n in own if rows[n]["variant"] == "full"]
        for n in own:
            if rows[n]["variant"] in ("full", "exact") or not whole:
                continue
            speed = rows[whole[0]]["processor_p50_ms"] / rows[n]["processor_p50_ms"]
            found.append((speed * rows[n]["macs"], [whole[0], n]))
    if not found:
        return None
    value, which = min(found)
    name = f"{target}: measured speed-up over 1 / share of multiply-adds, worst schedule"
    return _claim(name, value, 0.9, "ratio", "higher", which)


def _largest(name: str, part: str, goal: float, unit: str, rows: Rows) -> dict[str, Any] | None:
    which = [n for n in _pick(rows, part=part) if "largest_change" in rows[n]]
    if not which:
        return None
    value = max(rows[n]["largest_change"] for n in which)
    return _claim(name, value, goal, unit, "lower", which)


def _vocabulary(rows: Rows) -> dict[str, Any] | None:
    """Bytes that went less those of the table rows that went: 0 if nothing else changed size."""
    which = [n for n in _pick(rows, part="exact") if "table_bytes" in rows[n]]
    if not which:
        return None
    worst = max(abs(rows[n]["saved_bytes"] - rows[n]["table_bytes"]) for n in which)
    name = "vocabulary trimming: bytes saved less the table's, ids and embeddings unchanged"
    return _claim(name, float(worst), 0.0, "bytes", "lower", which)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"writes into {QUICK.name}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=latency.NAMES, default=list(latency.NAMES))
    parser.add_argument("--arms", nargs="+", choices=list(accuracy.arms()), help="of accuracy")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = QUICK if given.quick else RUNS
    path = folder / "reduction.json" if given.quick else RESULTS
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in kept if row["part"] not in given.parts]
    for part in given.parts:
        rows += measure(part, folder, given.quick, given.models, given.arms)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.reduction", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": [0],
        "rows": rows,
        "claims": claims(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.4g} (goal {claim['goal']:g}) {verdict}")


if __name__ == "__main__":
    main()
