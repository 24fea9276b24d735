"""Stages and exporters that do next to nothing, found by the real plugin mechanism."""

import json
from pathlib import Path
from typing import Any

STAGES = "toy.stages"
EXPORTERS = "toy.exporters"


def bench(run_dir: Path, recipe: Any, work: Any) -> None:
    """Write the two files that the runner expects of a benchmark."""
    row = {"artifact": "student", "target": "onnx", "tower": "image", "top1": 0.5, "p50_ms": 2.0}
    for name in ("bench.json", "summary.json"):
        (run_dir / name).write_text(json.dumps({"rows": [row]}))


def write_report(run_dir: Path) -> None:
    """Write the file that the runner tells the user to open."""
    (run_dir / "report.html").write_text("<html></html>")


def install() -> None:
    """Put the toys in place; for the processes that a test starts."""
    import benchmarks.report
    import benchmarks.run
    from compress import plugin

    plugin.STAGES, plugin.EXPORTERS = STAGES, EXPORTERS
    benchmarks.run.bench, benchmarks.report.write = bench, write_report
