"""Every target on every kind of model: passes with figures, or the exact reason.

    python -m benchmarks.experiments.targets            an hour or more on two cores
    python -m benchmarks.experiments.targets --quick    the embedded student, one precision a target
    python -m benchmarks.experiments.targets --minutes 20 --sources "embedded teacher"

What is tried is the exporters' contract (export/_contract.py), which the tests use too: a new
exporter, precision or source appears here by existing. Each case runs in a process of its own, so
that a converter may crash, and is kept in runs/targets: a stopped experiment continues. What was
left out is in the results as not run, and no claim holds because of it.
Models of open_clip have random weights, as nothing is downloaded: they show that a shape converts,
not what integers cost in accuracy.
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, target_matrix
from benchmarks.target_claims import ON_LINUX, STUDENT, claims
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
TEACHER = "embedded teacher"
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
    return [row | memory | {"load": machine.load_average()} for row in rows]


def kept_rows(source: str, target: str, precision: str | None, folder: Path) -> Path:
    """Where the rows of a case are kept."""
    name = source.replace("/", "-").replace(" ", "-")
    return folder / name / f"{target}-{precision}" / "rows.json"


def run(source: str, target: str, precision: str | None, folder: Path) -> Rows:
    """One case in a process of its own, if it is not there yet."""
    kept = kept_rows(source, target, precision, folder)
    place = kept.parent
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


def not_run(source: str, target: str, precision: str | None, reason: str) -> Rows:
    """The rows of a case that was left out."""
    about = {"source": source, "target": target, "precision": precision}
    row = {**about, "passed": False, "kind": "not run", "reason": f"not run: {reason}"}
    return [{**row, "tower": tower} for tower in ("image", "text")]


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


def _cases(quick: bool) -> list[tuple[int, str, str | None]]:
    """The contract's cases with the place of each precision in its target: 0 is the first."""
    found: list[tuple[int, str, str | None]] = []
    for target, precision in _contract.cases():
        place = sum(name == target for _, name, _ in found)
        found.append((place, target, precision))
    return [case for case in found if case[0] == 0 or not quick]


def _in_turn(sources: list[str], quick: bool) -> list[tuple[str, str, str | None]]:
    """First precisions of all sources before second ones, in the claims' order: time may end."""
    rank = {target: place for place, target in enumerate(ON_LINUX)}
    cases = sorted(_cases(quick), key=lambda case: rank.get(case[1], len(rank)))
    firsts = [(source, *case[1:]) for source in sources for case in cases if case[0] == 0]
    return firsts + [(source, *case[1:]) for source in sources for case in cases if case[0] > 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="writes to runs/targets-quick")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--minutes", type=float, help="start no case after this time")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        source, target, precision, place = options.case
        rows = case(source, target, precision or None, Path(place))
        atomic.write_json(Path(place) / "rows.json", rows)
    else:
        sources = [STUDENT] if options.quick else options.sources
        measure(sources, options.quick, options.minutes)


def measure(sources: list[str], quick: bool, minutes: float | None) -> None:
    """Run what is not there yet; unless quick, write the committed results and the page."""
    folder = RUNS.with_name("targets-quick") if quick else RUNS
    started = time.monotonic()
    for chosen in _in_turn(sources, quick):
        late = minutes is not None and time.monotonic() - started > 60 * minutes
        if late and not kept_rows(*chosen, folder).exists():
            continue
        found = run(*chosen, folder)
        verdict = ", ".join(str(row.get("worst_cosine", row["reason"])) for row in found)
        print(*chosen, verdict, flush=True)
    rows = _gathered(sources, quick, minutes, folder)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.targets", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": _versions(),
        "seeds": [SEED],
        "rows": rows,
        "claims": claims(rows),
    }
    atomic.write_json(folder / "targets.json" if quick else RESULTS, result)
    if not quick:
        PAGE.parent.mkdir(exist_ok=True)
        atomic.write_text(PAGE, target_matrix.page(result))


def _gathered(sources: list[str], quick: bool, minutes: float | None, folder: Path) -> Rows:
    """The rows of all cases in the order of the page, left-out ones with the reason."""
    rows: Rows = []
    for source in sources if quick else SOURCES:
        for _, target, precision in _cases(quick):
            chosen = (source, target, precision)
            if source not in sources:
                rows += not_run(*chosen, "this model was not among --sources")
            elif kept_rows(*chosen, folder).exists():
                rows += run(*chosen, folder)
            else:
                rows += not_run(*chosen, f"the {minutes:g} minutes of --minutes were over")
    return rows


if __name__ == "__main__":
    main()
