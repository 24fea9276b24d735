"""summary.json: one row per artifact and tower, each figure with what it was measured on.

Made from bench.json alone, so that the rules of what may be published stand in one place.
"""

from typing import Any

from benchmarks import roofline
from compress.errors import PocketclipError

SCHEMA_VERSION = 1

METRICS = (
    "top1",
    "top5",
    *(f"image_to_text_r{k}" for k in (1, 5, 10)),
    *(f"text_to_image_r{k}" for k in (1, 5, 10)),
    "teacher_top1_agreement",
    "teacher_image_cosine",
    "teacher_text_cosine",
    "teacher_overlap10",
    "index_text_to_image_r10",
    "index_image_to_text_r10",
    "index_overlap10",
)
TIMES = (
    "p50_ms",
    "p50_ms_ci95",
    "p90_ms",
    "p99_ms",
    "iqr_ms",
    "min_ms",
    "processor_p50_ms",
    "processor_speedup",
    "load_ms",
    "first_ms",
    "peak_memory_bytes",
    "energy_mj",
    "process_spread",
    "drift",
    "num_queries",
    "speedup",
    "speedup_ci95",
)
PLAIN = (
    "artifact",
    "target",
    "precision",
    "tower",
    "executed",
    "path",
    "sha256",
    "num_params",
    "num_embedding_params",
    "num_macs",
    "size_bytes",
    "parity_worst_cosine",
)


def summarise(bench: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of summary.json from that of bench.json and the manifest's finished steps.

    Raises PocketclipError where an artifact was timed whose accuracy was not measured.
    """
    check_accuracy_of_every_latency(bench)
    seconds = {step["folder"]: step["seconds"] for step in steps} | bench["seconds"]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": bench["name"],
        "date": bench["date"],
        "recipe_sha256": bench["recipe_sha256"],
        "headline_split": bench["headline_split"],
        "machine": bench["machine"],
        "versions": bench["versions"],
        "seconds": seconds,
        "rows": [row for artifact in bench["artifacts"] for row in _rows(artifact, bench)],
    }


def check_accuracy_of_every_latency(bench: dict[str, Any]) -> None:
    """A latency stands only beside the accuracy of the very same file."""
    measured = {a["sha256"] for a in bench["artifacts"] if a["accuracy"]}
    for timing in bench["timings"]:
        if "unavailable" not in timing and timing["sha256"] not in measured:
            raise PocketclipError(
                f"{timing['path']} ({timing['tower']} tower) was timed, but accuracy was not "
                f"measured on sha256 {timing['sha256'][:12]}: run evaluate on this very file first"
            )


def _rows(artifact: dict[str, Any], bench: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each thread count the artifact was timed at; one row if it was not."""
    accuracy = artifact["accuracy"].get(bench["headline_split"], {})
    row = {key: artifact.get(key) for key in PLAIN}
    for name in METRICS:
        row[name] = accuracy.get(name)
        row[f"{name}_ci95"] = accuracy.get(f"{name}_ci95")
    same = ("path", "tower", "sha256")
    timings = [t for t in bench["timings"] if all(t[key] == artifact[key] for key in same)]
    return [_timed(row, artifact, timing, bench) for timing in timings or [{}]]


def _timed(
    row: dict[str, Any], artifact: dict[str, Any], timing: dict[str, Any], bench: dict[str, Any]
) -> dict[str, Any]:
    figures = {key: timing.get(key) for key in TIMES}
    reason = artifact.get("unavailable") or timing.get("unavailable")
    splits = {name: _values(measured) for name, measured in artifact["accuracy"].items()}
    return {
        **row,
        **figures,
        "threads": timing.get("threads"),
        "scope": timing.get("scope"),
        "host": timing.get("host"),
        "placement": _counts(timing.get("placement")),
        "roofline": roofline.share(row, timing, bench.get("peaks", [])),
        "unavailable": reason,
        "splits": splits,
    }


def _counts(placement: dict[str, Any] | None) -> dict[str, int] | None:
    """Operators of each execution provider or delegate; bench.json says which they are."""
    if placement is None:
        return None
    return {name: sum(found.values()) for name, found in placement["operators"].items()}


def _values(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: measured[name] for name in METRICS if name in measured}
