"""Every target on every kind of model: passes with figures, or the exact reason.

    python -m benchmarks.experiments.targets            an hour or more on two cores
    python -m benchmarks.experiments.targets --quick    the embedded student, one precision a target

What is tried is the exporters' contract (export/_contract.py), which the tests use too: a new
exporter, precision or source appears here by existing. Each case runs in a process of its own, so
that a converter may crash, and is kept in runs/targets: a stopped experiment continues.
Models of open_clip have random weights, as nothing is downloaded: they show that a shape converts,
not what integers cost in accuracy.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, target_matrix
from compress import atomic, plugin
from compress import recipe as recipes
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.work import Work
from export import _contract

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
RESULTS = ROOT / "benchmarks/results/targets.json"
PAGE = ROOT / "docs/targets.md"
RUNS = ROOT / "runs/targets"
SEED = 0
LIMIT_SECONDS = 3600
TEACHER, STUDENT = "embedded teacher", "embedded student"
ON_LINUX = ("onnx", "onnxruntime", "openvino", "executorch", "litert", "mnn", "web")
"""Targets that must pass for both towers of every model on a Linux CPU."""
MINUTES = {STUDENT: 5, "ViT-B/16": 15}
LARGE_BYTES = 100_000_000
"""Weights beside which Python and its libraries weigh little."""
PACKAGES = (
    "openvino",
    "nncf",
    "executorch",
    "torchao",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "coremltools",
    "tensorrt-rtx",
    "ncnn",
    "MNN",
)

Rows = list[dict[str, Any]]


def open_clip(name: str) -> Callable[[], Clip]:
    """An architecture of open_clip with random weights."""
    return lambda: plugin.source(f"open_clip:{name}/random", ROOT)


def teacher() -> Clip:
    """The embedded teacher with the emoji data to calibrate and to measure on."""
    recipe = recipes.load(RECIPE)
    return replace(plugin.source(recipe.model, recipe.folder), data=recipe.shards())


def student(**stages: dict[str, Any]) -> Clip:
    """The quickstart's student as inheritance leaves it: its shape counts here, not training.

    stages: further stages with their settings.
    """
    recipe = recipes.load(RECIPE)
    clip, data = teacher(), recipe.shards()
    inherit = next(step.config for step in recipe.stages if step.name == "inherit")
    for name, settings in {"inherit": inherit.model_dump(), **stages}.items():
        stage = plugin.find(plugin.STAGES, name)
        with tempfile.TemporaryDirectory() as folder:
            work = Work(clip, clip, data, "cpu", SEED)
            clip = stage.run(work, stage.Config.model_validate(settings), Path(folder)).clip
    return replace(clip, data=data)


def quantized() -> Clip:
    """The student with 8-bit weights and inputs, ranges of 32 training pairs."""
    return student(quantize={"equalize": "none", "num_images": 32})


def reduced() -> Clip:
    """The student with half of its image tokens merged on the way."""
    return student(prune_tokens={"keep": 0.5})


SOURCES: dict[str, Callable[[], Clip]] = {
    TEACHER: teacher,
    STUDENT: student,
    "quantized student": quantized,
    "token-reduced student": reduced,
    "ViT-B/32": open_clip("ViT-B-32"),
    "ViT-B/16": open_clip("ViT-B-16"),
    "MobileCLIP2-S0": open_clip("MobileCLIP2-S0"),
    "SigLIP B/16": open_clip("ViT-B-16-SigLIP"),
}


def case(source: str, target: str, precision: str | None, folder: Path) -> Rows:
    """One case in this process -> its rows; memory is what the export added to the open model."""
    torch.manual_seed(SEED)
    about = {"target": target, "precision": precision}
    try:
        clip = SOURCES[source]()
    except PocketclipError as error:
        row = {**about, "passed": False, "kind": "no source", "reason": str(error)}
        return [{**row, "tower": tower} for tower in ("image", "text")]
    before = _peak_bytes()
    rows = _contract.prove(clip, target, precision, folder / "bundle")
    weights = sum(4 * p.numel() for p in clip.model.parameters())
    memory = {"peak_memory_bytes": _peak_bytes() - before, "weights_bytes": weights}
    return [row | memory for row in rows]


def run(source: str, target: str, precision: str | None, folder: Path) -> Rows:
    """One case in a process of its own, if it is not there yet."""
    place = folder / source.replace("/", "-").replace(" ", "-") / f"{target}-{precision}"
    kept = place / "rows.json"
    if not kept.exists():
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.experiments.targets", "--case"]
        command += [source, target, precision or "", str(place)]
        with (place / "log.txt").open("w") as log:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=log, timeout=LIMIT_SECONDS
                ).returncode
            except subprocess.TimeoutExpired:
                code = LIMIT_SECONDS
        if not kept.exists():
            reason = _last_words(place / "log.txt", code)
            row = {"target": target, "precision": precision, "passed": False, "kind": "crashed"}
            atomic.write_json(
                kept, [{**row, "tower": t, "reason": reason} for t in ("image", "text")]
            )
        shutil.rmtree(place / "bundle", ignore_errors=True)
    found: Rows = json.loads(kept.read_text())
    return [{"source": source, **row} for row in found]


def claims(rows: Rows) -> list[dict[str, Any]]:
    """Share of models that pass, per target; time and memory of an export."""
    made = []
    for target in ON_LINUX:
        indices = [i for i, row in enumerate(rows) if _counts(row, target)]
        if indices:
            share = sum(rows[i]["passed"] for i in indices) / len(indices)
            made.append(_claim(f"{target}: towers that pass", share, 1.0, "fraction", indices))
    for source, minutes in MINUTES.items():
        indices = [
            i
            for i, row in enumerate(rows)
            if row["source"] == source and row["tower"] == "image" and "seconds" in row
        ]
        if indices:
            seconds = _default_seconds(rows, indices)
            name = f"{source} to all installed targets, one precision each"
            made.append(_claim(name, seconds, 60 * minutes, "seconds", indices, "lower"))
    large = [i for i, row in enumerate(rows) if row.get("weights_bytes", 0) >= LARGE_BYTES]
    large = [i for i in large if rows[i]["passed"]]
    if large:
        worst = max(rows[i]["peak_memory_bytes"] / rows[i]["weights_bytes"] for i in large)
        name = "memory an export adds, over the weights, worst case"
        made.append(_claim(name, worst, 4.0, "ratio", large, "lower"))
    return made


def _counts(row: dict[str, Any], target: str) -> bool:
    """Whether a row says something of a target: its source opens. No runtime here is a failure."""
    return bool(row["target"] == target and row["kind"] != "no source")


def _default_seconds(rows: Rows, indices: list[int]) -> float:
    """Sum over targets of the first precision's time."""
    first: dict[str, float] = {}
    for i in indices:
        first.setdefault(rows[i]["target"], rows[i]["seconds"])
    return round(sum(first.values()), 1)


def _claim(
    name: str, value: float, goal: float, unit: str, rows: list[int], better: str = "higher"
) -> dict[str, Any]:
    holds = value >= goal if better == "higher" else value <= goal
    about = {"name": name, "value": value, "goal": goal, "unit": unit, "better": better}
    return {**about, "holds": holds, "rows": rows}


def _last_words(log: Path, code: int) -> str:
    """What a crashed converter said last, without the places of this machine."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "Error" in line), (lines or [""])[-1])
    return f"exit code {code}: {said.strip()[:300]}".replace(str(ROOT), ".")


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _versions() -> dict[str, str]:
    found = machine.versions()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _chosen(sources: list[str], quick: bool) -> list[tuple[str, str, str | None]]:
    cases = _contract.cases()
    if quick:
        sources, cases = [STUDENT], [cases[[t for t, _ in cases].index(n)] for n, _ in cases]
        cases = list(dict.fromkeys(cases))
    return [(source, *case) for source in sources for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="writes to runs/targets-quick")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        source, target, precision, place = options.case
        rows = case(source, target, precision or None, Path(place))
        atomic.write_json(Path(place) / "rows.json", rows)
    else:
        measure(options.sources, options.quick)


def measure(sources: list[str], quick: bool) -> None:
    """Run what is not there yet; with all sources, write the committed results and the page."""
    whole = not quick and sources == list(SOURCES)
    folder = RUNS.with_name("targets-quick") if quick else RUNS
    rows = []
    for chosen in _chosen(sources, quick):
        rows += run(*chosen, folder)
        verdict = ", ".join(str(row.get("worst_cosine", row["reason"])) for row in rows[-2:])
        print(*chosen, verdict, flush=True)
    result = {
        "command": "python -m benchmarks.experiments.targets",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": _versions(),
        "seeds": [SEED],
        "rows": rows,
        "claims": claims(rows),
    }
    atomic.write_json(RESULTS if whole else folder / "targets.json", result)
    if whole:
        PAGE.parent.mkdir(exist_ok=True)
        atomic.write_text(PAGE, target_matrix.page(result))


if __name__ == "__main__":
    main()
