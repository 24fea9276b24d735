"""The figures behind the report's verdict: each with its meaning on hover and its raw place."""

from typing import Any

from benchmarks.labels import (
    describe_metric,
    interval,
    megabytes,
    milliseconds,
    percent,
    times,
    times_interval,
)
from benchmarks.raw import Places
from benchmarks.story import Artifacts, baseline, teacher

Artifact = dict[str, Any]
Tile = dict[str, str]


def tiles(
    artifacts: Artifacts, best: Artifact | None, metric: str | None, places: Places
) -> list[Tile]:
    """The tiles that this run has figures for.

    `value`, `label`, `detail`, `note` (shown on hover), `place` (a link to the raw figure).
    """
    if best is None:
        return []
    reference, other = baseline(artifacts), teacher(artifacts)
    found = [
        _speed(best, reference, places),
        _size(best, reference, places),
        _accuracy(best, other, metric, places),
        _parity(best, places),
    ]
    return [tile for tile in found if tile is not None]


def _speed(best: Artifact, reference: Artifact | None, places: Places) -> Tile | None:
    row = best["towers"]["image"]
    if row["speedup"] is None or reference is None:
        return None
    slow = reference["towers"]["image"]["p50_ms"]
    return {
        "value": times(row["speedup"]),
        "label": "image tower speed",
        "detail": f"{milliseconds(slow)} → {milliseconds(row['p50_ms'])} an image",
        "note": f"95 % interval {times_interval(row['speedup_ci95'])}. Median of "
        f"{row['num_queries']} queries, batch 1, {row['threads']} thread(s), against the "
        "teacher in ONNX Runtime fp32, timed in the same rounds.",
        "place": places.timing(row, "speedup"),
    }


def _size(best: Artifact, reference: Artifact | None, places: Places) -> Tile | None:
    if not reference or not reference["size_bytes"] or not best["size_bytes"]:
        return None
    return {
        "value": times(reference["size_bytes"] / best["size_bytes"]),
        "label": "smaller files",
        "detail": f"{megabytes(reference['size_bytes'])} → {megabytes(best['size_bytes'])}",
        "note": "Image and text tower together, against the teacher's fp32 files.",
        "place": places.artifact(best["towers"]["image"], "size_bytes"),
    }


def _accuracy(
    best: Artifact, other: Artifact | None, metric: str | None, places: Places
) -> Tile | None:
    row = best["towers"]["image"]
    if metric is None or other is None or row.get(metric) is None:
        return None
    whole = other["towers"]["image"][metric]
    kept = f": {percent(row[metric] / whole, 0)} kept" if whole else ""
    return {
        "value": percent(row[metric]),
        "label": describe_metric(metric),
        "detail": f"teacher {percent(whole)}{kept}",
        "note": f"95 % interval {interval(row[f'{metric}_ci95'])}, measured on the exported files "
        "themselves.",
        "place": places.accuracy(row, metric),
    }


def _parity(best: Artifact, places: Places) -> Tile | None:
    worst = {t["parity_worst_cosine"]: t for t in best["towers"].values()}
    if any(value is None for value in worst):
        return None
    lowest = min(worst)
    return {
        "value": f"{lowest:.4f}",
        "label": "worst export cosine",
        "detail": "files against their torch model",
        "note": "Lowest cosine similarity between an embedding of the exported file and "
        "of the torch model it was made from; 1 means nothing was lost in export.",
        "place": places.artifact(worst[lowest], "parity_worst_cosine"),
    }
