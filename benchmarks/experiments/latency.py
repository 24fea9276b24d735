"""Whether the latencies can be trusted: narrow intervals, the same ranking again, others' figures.

    python -m benchmarks.experiments.latency --bundles FOLDER   about ten minutes on an idle machine
    python -m benchmarks.experiments.latency --quick            short rounds, two repeats

FOLDER holds bundles (the export folder of a run). The whole benchmark is repeated. After each time
every ONNX file is timed as `onnxruntime_perf_test` does it (tensors bound once, one query after the
other in one process), and every OpenVINO file by `benchmark_app`, one stream, one thread: what is
compared was measured minutes apart. What is measured is kept in runs/latency, repeat by repeat:
remove it to measure again.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bundles, machine, run
from benchmarks.timing import Config
from compress.atomic import write_json
from compress.errors import PocketclipError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/latency.json"
RUNS = ROOT / "runs/latency"
BUNDLES = ROOT / "runs/quickstart/export"
REPEATS = 3
QUICK = Config(processes=1, rounds=4, patience_seconds=0)
APART = 1.05
"""Two medians nearer than this are a tie: their order says nothing."""


def kept(path: Path, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What was measured before a stop, or is measured now."""
    if not path.exists():
        write_json(path, measure())
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def repeated(folder: Path, cfg: Config, repeat: int) -> list[dict[str, Any]]:
    """A row for each bundle and tower."""
    found = run.bench_bundles([folder], cfg)
    busy = found["hosts"]["local"]["disturbance"]["cores_busy"]
    keep = ("tower", "p50_ms", "p50_ms_ci95", "min_ms", "num_queries", "speedup")
    return [
        {
            "repeat": repeat,
            "cores_busy": busy,
            "path": Path(row["path"]).name,
            **{key: row.get(key) for key in keep},
        }
        for row in found["timings"]
    ]


def others(folder: Path, seconds: float, repeat: int) -> list[dict[str, Any]]:
    """The same files by other tools, after a repeat: mean and median milliseconds."""
    rows = []
    for bundle in map(bundles.read, run.bundle_folders(folder)):
        for tower in bundles.TOWERS:
            path = bundle.folder / bundle.about[tower]["file"]
            measure = {".onnx": as_perf_test, ".xml": by_benchmark_app}.get(path.suffix)
            found = measure(path, bundle, tower, seconds) if measure else None
            if found:
                rows.append({"repeat": repeat, "path": bundle.folder.name, "tower": tower, **found})
    return rows


def as_perf_test(path: Path, bundle: Any, tower: str, seconds: float) -> dict[str, Any]:
    """One session, one warm-up query, then queries in a row."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    query, binding = bundle.queries(tower)[:1], session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, query)
    binding.bind_output(session.get_outputs()[0].name)
    session.run_with_iobinding(binding)
    samples, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        samples.append(1e3 * (time.perf_counter() - start))
    mean, median = float(np.mean(samples)), float(np.median(samples))
    return {"tool": "as onnxruntime_perf_test", "mean_ms": mean, "p50_ms_other": median}


def by_benchmark_app(path: Path, bundle: Any, tower: str, seconds: float) -> dict[str, Any] | None:
    """OpenVINO's own tool; None where it is not installed."""
    beside = Path(sys.executable).parent / "benchmark_app"
    program = str(beside) if beside.exists() else shutil.which("benchmark_app")
    if program is None:
        return None
    precision = bundle.about["runtime"].get("inference_precision", "f32")
    words = [program, "-m", str(path), "-d", "CPU", "-api", "sync", "-hint", "none"]
    words += ["-nthreads", "1", "-nstreams", "1", "-t", str(max(1, round(seconds)))]
    done = subprocess.run([*words, "-infer_precision", precision], capture_output=True, text=True)
    found = re.search(r"Median:\s+([\d.]+) (ms|us)", done.stdout)
    if found is None:
        raise PocketclipError(f"benchmark_app told no median: {(done.stdout + done.stderr)[-300:]}")
    scale = {"ms": 1.0, "us": 1e-3}[found.group(2)]
    return {"tool": "benchmark_app", "p50_ms_other": scale * float(found.group(1))}


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Width of the intervals, rankings that changed, distance to the other tools' figures."""
    own = [i for i, row in enumerate(rows) if row.get("p50_ms")]
    widths = {
        i: (rows[i]["p50_ms_ci95"][1] - rows[i]["p50_ms_ci95"][0]) / rows[i]["p50_ms"] for i in own
    }
    found = [_claim("widest 95 % interval of a median", max(widths.values()), 0.03, own)]
    found.append(
        _claim("pairs of artifacts whose order changed between repeats", _swaps(rows, own), 0, own)
    )
    theirs = [i for i, row in enumerate(rows) if row.get("p50_ms_other")]
    if theirs:
        name = "largest difference to the other tools' medians"
        apart = max(_apart(rows, own, theirs).values())
        found.append(_claim(name, apart, 0.05, [*own, *theirs]))
    return found


def _apart(
    rows: list[dict[str, Any]], own: list[int], theirs: list[int]
) -> dict[tuple[str, str], float]:
    """Of each file and tower: the median over the repeats of other tool / ours, less 1."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for i in theirs:
        key = (rows[i]["path"], rows[i]["tower"])
        [j] = [j for j in own if all(rows[i][k] == rows[j][k] for k in ("path", "tower", "repeat"))]
        ratios.setdefault(key, []).append(rows[i]["p50_ms_other"] / rows[j]["p50_ms"])
    return {key: abs(float(np.median(found)) - 1) for key, found in ratios.items()}


def _swaps(rows: list[dict[str, Any]], own: list[int]) -> int:
    """Pairs of one tower that a repeat puts in one order and another in the opposite one."""
    changed = set()
    keys = sorted({(rows[i]["tower"], rows[i]["path"]) for i in own})
    for n, first in enumerate(keys):
        for second in keys[n + 1 :]:
            ratios = [
                rows[i]["p50_ms"] / rows[j]["p50_ms"]
                for i in own
                for j in own
                if (rows[i]["tower"], rows[i]["path"]) == first
                and (rows[j]["tower"], rows[j]["path"]) == second
                and rows[i]["repeat"] == rows[j]["repeat"]
            ]
            opposite = max(ratios) > APART and min(ratios) < 1 / APART
            if first[0] == second[0] and opposite:
                changed.add((first, second))
    return len(changed)


def _claim(name: str, value: float, goal: float, rows: list[int]) -> dict[str, Any]:
    unit = "count" if goal == 0 else "fraction"
    about = {"name": name, "value": value, "goal": goal, "unit": unit, "better": "lower"}
    return {**about, "holds": bool(value <= goal), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundles", type=Path, default=BUNDLES, help="a folder of bundles")
    parser.add_argument("--quick", action="store_true", help="writes into runs/latency-quick")
    given = parser.parse_args()
    place = RUNS.with_name("latency-quick") if given.quick else RUNS
    cfg, repeats = (QUICK, 2) if given.quick else (Config(), REPEATS)
    rows, seconds = [], 1.0 if given.quick else 3.0
    for n in range(repeats):
        again, other = partial(repeated, given.bundles, cfg, n), partial(others, given.bundles)
        rows += kept(place / f"repeat-{n}.json", again)
        rows += kept(place / f"others-{n}.json", partial(other, seconds, n))
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.latency", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": [Config().seed],
        "rows": rows,
        "claims": claims(rows),
    }
    write_json(place / "latency.json" if given.quick else RESULTS, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.3f} (goal {claim['goal']:g}) {verdict}")


if __name__ == "__main__":
    main()
