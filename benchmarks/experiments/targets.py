"""Every target on every kind of model: passes with figures, or the exact reason.

    python -m benchmarks.experiments.targets            an hour or more on two cores
    python -m benchmarks.experiments.targets --quick    the embedded student, one precision a target
    python -m benchmarks.experiments.targets --minutes 20 --sources "embedded teacher" \\
        --targets onnx openvino
    python -m benchmarks.experiments.targets --keep     only what the committed results lack

What is tried is the exporters' contract (export/_contract.py), which the tests use too: a new
exporter, precision or source appears here by existing. Each case runs in a process of its own, so
that a converter may crash, and is kept in runs/targets: a stopped experiment continues. `--keep`
takes cases that are not there from the committed results, where both towers passed. What was left
out is in the results as not run, and no claim holds because of it.
After `make quickstart` the student is the trained one, else as inheritance leaves it. Models of
open_clip have random weights, as nothing is downloaded: they show that a shape converts, not what
integers cost in accuracy.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, target_matrix
from benchmarks.experiments import _forked
from benchmarks.experiments.target_sources import ROOT, SEED, SOURCES, TIMED, opened, trained
from benchmarks.target_claims import ON_LINUX, STUDENT, claims
from compress import atomic
from compress.errors import PocketclipError
from export import _contract, _reference

RESULTS = ROOT / "benchmarks/results/targets.json"
PAGE = ROOT / "docs/targets.md"
RUNS = ROOT / "runs/targets"
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


def case(source: str, target: str, precision: str | None, folder: Path) -> Rows:
    """One case in this process -> its rows; memory is what the export added to the open model."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    about = {"target": target, "precision": precision}
    try:
        clip = opened(source, folder.parent / "model")
    except PocketclipError as error:
        row = {**about, "passed": False, "kind": "no source", "reason": str(error)}
        return [{**row, "tower": tower} for tower in ("image", "text")]
    said = folder.parent / "reference.npz"
    _reference.load(said)
    with memory.watching() as watch:
        rows = _contract.prove(clip, target, precision, folder / "bundle")
    _reference.save(said)
    more = {
        "peak_memory_bytes": watch.added_bytes,
        "weights_bytes": sum(4 * p.numel() for p in clip.model.parameters()),
        "trained": trained(clip),
        "load": machine.load_average(),
        "cpu": machine.describe()["cpu"],
    }
    return [row | more for row in rows]


def kept_rows(source: str, target: str, precision: str | None, folder: Path) -> Path:
    """Where the rows of a case are kept."""
    name = source.replace("/", "-").replace(" ", "-")
    return folder / name / f"{target}-{precision}" / "rows.json"


def take_committed(folder: Path, results: Path) -> None:
    """Keep the cases of a results file whose towers all passed in `folder`, where it has none."""
    cases: dict[Path, Rows] = {}
    found = json.loads(results.read_text())
    for row in found["rows"]:
        row.setdefault("cpu", found["machine"]["cpu"])
        kept = kept_rows(row.pop("source"), row["target"], row["precision"], folder)
        cases.setdefault(kept, []).append(row)
    for kept, rows in cases.items():
        if all(row["passed"] for row in rows) and not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_json(kept, rows)


def run(source: str, target: str, precision: str | None, folder: Path) -> Rows:
    """One case in a process of its own, if it is not there yet."""
    kept = kept_rows(source, target, precision, folder)
    if not kept.exists():
        chosen = (source, target, precision, kept)
        reason = _forked.call(_keep_case, chosen, kept.with_name("log.txt"))
        if not kept.exists():
            row = {"target": target, "precision": precision, "passed": False, "kind": "crashed"}
            atomic.write_json(
                kept, [{**row, "tower": t, "reason": reason} for t in ("image", "text")]
            )
        shutil.rmtree(kept.with_name("bundle"), ignore_errors=True)
    found: Rows = json.loads(kept.read_text())
    return [{"source": source, **row} for row in found]


def _keep_case(source: str, target: str, precision: str | None, kept: Path) -> None:
    atomic.write_json(kept, case(source, target, precision, kept.parent))


def not_run(source: str, target: str, precision: str | None) -> Rows:
    """The rows of a case that was left out."""
    about = {"source": source, "target": target, "precision": precision}
    row = {**about, "passed": False, "kind": "not run", "reason": "not run yet"}
    return [{**row, "tower": tower} for tower in ("image", "text")]


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
    whole = [source for source in sources if source not in TIMED]
    return firsts + [(source, *case[1:]) for source in whole for case in cases if case[0] > 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="writes to runs/targets-quick")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=list(SOURCES))
    names = sorted({target for target, _ in _contract.cases()})
    parser.add_argument("--targets", nargs="*", default=names, choices=names)
    parser.add_argument("--minutes", type=float, help="start no case after this time")
    parser.add_argument("--keep", action="store_true", help="passes of committed results stand")
    options = parser.parse_args()
    if options.keep:
        take_committed(RUNS, RESULTS)
    sources = [STUDENT] if options.quick else options.sources
    measure(sources, options.targets, options.quick, options.minutes)


def measure(sources: list[str], targets: list[str], quick: bool, minutes: float | None) -> None:
    """Run what is not there yet; unless quick, write the committed results and the page."""
    folder = RUNS.with_name("targets-quick") if quick else RUNS
    started = time.monotonic()
    for chosen in _in_turn(sources, quick):
        late = minutes is not None and time.monotonic() - started > 60 * minutes
        if chosen[1] not in targets or (late and not kept_rows(*chosen, folder).exists()):
            continue
        found = run(*chosen, folder)
        verdict = ", ".join(str(row.get("worst_cosine", row["reason"])) for row in found)
        print(*chosen, verdict, flush=True)
    rows = _gathered(quick, folder)
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


def _gathered(quick: bool, folder: Path) -> Rows:
    """The rows of all cases in the order of the page; left-out ones say so."""
    rows: Rows = []
    for source in [STUDENT] if quick else SOURCES:
        for _, target, precision in _cases(quick or source in TIMED):
            chosen = (source, target, precision)
            kept = kept_rows(*chosen, folder).exists()
            rows += run(*chosen, folder) if kept else not_run(*chosen)
    return rows


if __name__ == "__main__":
    main()
