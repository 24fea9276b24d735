"""Inheritance + affinity against training from scratch, and the quickstart's figures.

    python -m benchmarks.experiments.first_light            about an hour on two cores
    python -m benchmarks.experiments.first_light --quick    a few minutes; shows only that it works

Two parts. The quickstart itself, with several seeds: the first one also exports and times, alone on
the machine. And arms that train the quickstart's student on equal samples (same seed, same batches,
a shorter schedule), three seeds each, two runs at a time with one thread each. Finished runs are
kept in runs/first-light, so a stopped experiment continues.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from compress.atomic import write_json

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
SCRATCH = ROOT / "recipes/emoji/scratch.yaml"
BASELINE = ROOT / "benchmarks/results/emoji_baseline.json"
RESULTS = ROOT / "benchmarks/results/first_light.json"
RUNS = ROOT / "runs/first-light"
QUICK = ROOT / "runs/first-light-quick"
SEEDS = (0, 1, 2)
STEPS = 150
"""Optimiser steps of each arm, of 512 samples."""
WHOLE, OURS, PLAIN = "quickstart", "inheritance + affinity", "scratch"
NAMES = {"top1": "top-1", "top5": "top-5"}
FIGURES = ("top1", "top5", "image_to_text_r1", "text_to_image_r1", "text_to_image_r10")


def arms() -> dict[str, tuple[Path, list[str]]]:
    """Arm -> the recipe and what is set differently in it."""
    short = [f"stages.distill.steps={STEPS}", "stages.distill.checkpoint_every=50"]
    short.append("evaluate.splits=[held_out_style]")
    return {
        WHOLE: (RECIPE, []),
        PLAIN: (SCRATCH, short),
        OURS: (RECIPE, [*short, "stages.distill.views=2"]),
    }


def train(arm: str, seed: int, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Run one arm with one seed, if it is not there yet -> its held-out-style rows."""
    recipe, settings = arms()[arm]
    out = folder / f"{arm.replace(' + ', '-')}-{seed}"
    alone = arm == WHOLE and seed == SEEDS[0]
    settings = [*settings, *overrides, f"seed={seed}", *([] if alone else ["export=[]"])]
    command = [sys.executable, "-m", "compress", "run", str(recipe), "--out", str(out)]
    for setting in settings:
        command += ["--set", setting]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{out.name}.log"
    environment = os.environ | ({} if alone else {"OMP_NUM_THREADS": "1"})
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode:
        sys.exit(f"{arm}, seed {seed} failed: see {log}")
    return rows_of(arm, seed, out)


def rows_of(arm: str, seed: int, run: Path) -> list[dict[str, Any]]:
    """The rows of a run's summary.json that the claims need: the student's, once the teacher's."""
    summary = json.loads((run / "summary.json").read_text())
    seconds = sum(v for k, v in summary["seconds"].items() if k.endswith("distill"))
    keep = ("artifact", "target", "precision", "tower", "executed", "num_params", "size_bytes")
    timed = ("p50_ms", "speedup", "speedup_ci95", "threads", "parity_worst_cosine")
    return [
        {"arm": arm, "seed": seed, "train_seconds": seconds}
        | {key: row.get(key) for key in (*keep, *FIGURES, *timed)}
        for row in summary["rows"]
        if row["artifact"] == "student" or (arm, seed) == (WHOLE, SEEDS[0])
    ]


def claims(rows: list[dict[str, Any]], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure that First light asks for, computed from the rows alone."""
    found = [
        _claim("teacher, held-out style, top-1", _teacher(rows), 0.60, rows, "top1"),
        _beats(rows, baseline, "top1"),
        _beats(rows, baseline, "top5"),
        _fewer(rows),
        _kept(rows),
        _margin(rows),
        *_shipped(rows),
    ]
    return [claim for claim in found if claim["rows"]]


def _pick(rows: list[dict[str, Any]], **wanted: Any) -> list[int]:
    """Indices of the rows with these values."""
    return [i for i, row in enumerate(rows) if all(row.get(k) == v for k, v in wanted.items())]


def _teacher(rows: list[dict[str, Any]]) -> list[int]:
    return _pick(rows, arm=WHOLE, artifact="teacher", target="torch", tower="image")[:1]


def _student(rows: list[dict[str, Any]], arm: str) -> list[int]:
    return _pick(rows, arm=arm, artifact="student", target="torch", tower="image")


def _entry(name: str, value: float, goal: float, unit: str, rows: list[int]) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "goal": goal,
        "unit": unit,
        "better": "higher",
        "holds": bool(value >= goal),
        "rows": rows,
    }


def _claim(
    name: str, which: list[int], goal: float, rows: list[dict[str, Any]], key: str
) -> dict[str, Any]:
    value = float(np.mean([rows[i][key] for i in which]))
    return _entry(name, value, goal, "fraction", which)


def _beats(rows: list[dict[str, Any]], baseline: dict[str, Any], key: str) -> dict[str, Any]:
    """The teacher against the no-learning baseline, both over all names."""
    nearest = next(r for r in baseline["rows"] if r["split"] == "held_out_style")
    name = f"teacher, held-out style, {NAMES[key]}, against the no-learning baseline's"
    return _claim(name, _teacher(rows), nearest[key], rows, key)


def _fewer(rows: list[dict[str, Any]]) -> dict[str, Any]:
    num = {
        artifact: sum(
            rows[i]["num_params"]
            for i in _pick(rows, arm=WHOLE, seed=SEEDS[0], artifact=artifact, target="torch")
        )
        for artifact in ("teacher", "student")
    }
    which = _pick(rows, arm=WHOLE, seed=SEEDS[0], target="torch")
    ratio = num["teacher"] / num["student"]
    return _entry("teacher parameters over student parameters", ratio, 5.0, "ratio", which)


def _kept(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the seeds of the student's top-1 over the teacher's."""
    which, teacher = _student(rows, WHOLE), _teacher(rows)
    value = float(np.mean([rows[i]["top1"] for i in which])) / rows[teacher[0]]["top1"]
    name = f"student keeps of the teacher's held-out-style top-1, mean of {len(which)} seed(s)"
    return _entry(name, value, 0.85, "fraction", [*teacher, *which])


def _margin(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Worst seed of inheritance + affinity less the best of scratch, at equal samples."""
    ours, plain = _student(rows, OURS), _student(rows, PLAIN)
    value = min(rows[i]["top1"] for i in ours) - max(rows[i]["top1"] for i in plain)
    name = "inheritance + affinity, worst seed, over scratch, best seed, top-1"
    return _entry(name, value, 0.05, "fraction", ours + plain)


def _shipped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sizes and speed of the int8 files against the teacher's fp32 in the same run."""
    teacher = _pick(rows, artifact="teacher", target="onnxruntime", precision="fp32")
    student = _pick(rows, artifact="student", target="onnxruntime", precision="int8")
    if not teacher or not student:
        return []
    ratio = sum(rows[i]["size_bytes"] for i in teacher) / sum(
        rows[i]["size_bytes"] for i in student
    )
    image = [i for i in student if rows[i]["tower"] == "image"]
    return [
        _entry(
            "teacher fp32 files over student int8 files", ratio, 12.0, "ratio", teacher + student
        ),
        _entry(
            "student int8 image tower's speed over the teacher's fp32 in ONNX Runtime, 1 thread",
            rows[image[0]]["speedup"],
            6.0,
            "ratio",
            image,
        ),
        _int8_keeps(rows, image),
    ]


def _int8_keeps(rows: list[dict[str, Any]], int8: list[int]) -> dict[str, Any]:
    """Top-1 of the int8 files over that of the torch student they were made from."""
    student = _pick(rows, arm=WHOLE, seed=SEEDS[0], artifact="student", target="torch")
    which = [i for i in student if rows[i]["tower"] == "image"][:1]
    ratio = rows[int8[0]]["top1"] / rows[which[0]]["top1"]
    name = "student int8 files keep of the torch student's held-out-style top-1, seed 0"
    return _entry(name, ratio, 0.99, "fraction", [*which, int8[0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"20 steps; writes into {QUICK.name}")
    parser.add_argument("--whole-seeds", type=int, default=len(SEEDS), help="quickstart runs")
    given = parser.parse_args()
    folder = QUICK if given.quick else RUNS
    overrides = ["stages.distill.steps=20"] if given.quick else []
    rows = train(WHOLE, SEEDS[0], folder, overrides)
    others = [(WHOLE, seed) for seed in SEEDS[1 : given.whole_seeds]]
    others += [(arm, seed) for seed in SEEDS for arm in arms() if arm != WHOLE]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda job: train(job[0], job[1], folder, overrides), others):
            rows += found
    result: dict[str, Any] = {
        "command": "python -m benchmarks.experiments.first_light"
        + (" --quick" if given.quick else f" --whole-seeds {given.whole_seeds}"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": list(SEEDS),
        "rows": rows,
        "claims": claims(rows, json.loads(BASELINE.read_text())),
    }
    write_json(QUICK / "first_light.json" if given.quick else RESULTS, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.3f} (goal {claim['goal']:g}) {verdict}")


if __name__ == "__main__":
    main()
