"""What training gives back of what fewer tokens cost, and methods that learn; for reduction.py.

Every arm is recipes/emoji/tokens_recovery.yaml, with another method of choosing tokens or with its
own; the untrained model at the final schedule, `start`, stands beside each.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import compress.clip
from benchmarks.experiments import _reduction_accuracy as accuracy
from compress.atomic import sha256, write_json
from compress.batches import embed_names
from compress.clip import Clip
from compress.stages.exact import pooled_last
from compress.stages.prune_tokens import reduced
from compress.structure import plain_vision

RECIPE = accuracy.EMOJI / "tokens_recovery.yaml"
ARMS: dict[str, dict[str, Any]] = {
    "recovered 0.60": {},
    "cross, trained 0.60": {"method": "cross"},
    "selector, trained 0.60": {"method": "selector", "queries": 4},
}
"""Name -> settings of each prune_tokens stage in place of the recipe's."""
UNMEASURED = (
    "evaluate.num_images=32",
    "bench.patience_seconds=0",
    "bench.processes=1",
    "bench.rounds=2",
    "bench.min_queries=5",
)
"""Of the runs: another part times, and accuracy is measured here."""

Rows = list[dict[str, Any]]


def measure(folder: Path, tasks: accuracy.Tasks, arms: list[str], seeds: list[int]) -> Rows:
    """Rows of each arm and seed, kept in `folder` under the recipe's digest once measured."""
    rows: Rows = []
    for arm in arms:
        for seed in seeds:
            out = folder / tasks.digest / sha256(RECIPE)[:12] / f"{arm.replace(' ', '-')}-{seed}"
            kept = out / "rows.json"
            if not kept.exists():
                write_json(kept, _rows(out, tasks, arm, seed))
            rows += json.loads(kept.read_text())
    return rows


def _rows(out: Path, tasks: accuracy.Tasks, arm: str, seed: int) -> Rows:
    """Train, and measure both tasks before and after."""
    stages = [next(iter(stage)) for stage in yaml.safe_load(RECIPE.read_text())["stages"]]
    command = [sys.executable, "-m", "compress", "run", str(RECIPE), "--out", str(out / "run")]
    settings = ["export=[]", f"seed={seed}", *UNMEASURED]
    for n, stage in enumerate(stages):
        if stage == "prune_tokens":
            settings += [f"stages[{n}].{key}={value}" for key, value in ARMS[arm].items()]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, cwd=accuracy.ROOT, check=True)
    last = max(n for n, stage in enumerate(stages) if stage in ("prune_tokens", "distill"))
    student = compress.clip.load(out / "run" / f"{last:02d}-{stages[last]}")
    found = plain_vision(student.model.config, "recovery").reduction
    start = pooled_last(reduced(tasks.teacher, found))
    return _of(tasks, student, arm, seed, "student") + _of(tasks, start, arm, seed, "start")


def _of(tasks: accuracy.Tasks, clip: Clip, arm: str, seed: int, artifact: str) -> Rows:
    names = [name for _, name in tasks.data.classes]
    classes = embed_names(clip, names, list(accuracy.TEMPLATES))
    share = accuracy.share_of(tasks.teacher, pooled_last(clip))
    rows: Rows = []
    for split in accuracy.SPLITS:
        right = tasks.top1(clip, split, classes)
        row: dict[str, Any] = {"part": "recovery", "arm": arm, "seed": seed, "split": split}
        row |= {"artifact": artifact, "num_images": len(right), "top1": float(right.mean())}
        row["macs"] = round(share, 4)
        rows.append(row)
    return rows
