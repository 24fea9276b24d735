"""What the report shows beside its headline: rows for the filters, layers, placement, limits."""

import json
from typing import Any

from benchmarks.labels import describe_metric

EXPLORED = {
    "p50_ms": "median, ms",
    "p90_ms": "90th percentile, ms",
    "min_ms": "fastest, ms",
    "processor_p50_ms": "processor time, ms",
    "load_ms": "load, ms",
    "first_ms": "first query, ms",
    "peak_memory_bytes": "peak memory, MB",
    "size_bytes": "files of the tower, MB",
    "num_macs": "multiply-adds, M",
    "energy_mj": "energy, mJ",
}
"""What may stand on the horizontal axis: less of it is better."""
SCALES = {"peak_memory_bytes": 1e-6, "size_bytes": 1e-6, "num_macs": 1e-6}
ACCURACIES = {
    "top1": describe_metric("top1"),
    "top5": "top-5 accuracy",
    "image_to_text_r1": "image-to-text recall@1",
    "image_to_text_r10": "image-to-text recall@10",
    "text_to_image_r1": "text-to-image recall@1",
    "text_to_image_r10": "text-to-image recall@10",
    "teacher_top1_agreement": "same best class as the teacher",
    "parity_worst_cosine": "worst export cosine",
}
FILTERS = ("tower", "scope", "host", "threads", "target", "precision")
Artifacts = list[dict[str, Any]]


def explorer(artifacts: Artifacts) -> dict[str, Any] | None:
    """The rows behind the plot with filters, as JSON for the page; None without any latency."""
    rows = []
    for artifact in artifacts:
        for row in artifact["rows"]:
            if row["unavailable"] or artifact["target"] == "torch":
                continue
            figures = {key: _scaled(key, row.get(key)) for key in (*EXPLORED, *ACCURACIES)}
            about = {key: row.get(key) for key in FILTERS}
            about |= {"label": artifact["name"], "color": artifact["color"], "path": row["path"]}
            rows.append(about | figures)
    if not rows:
        return None
    return {
        "x": {key: name for key, name in EXPLORED.items() if _known(rows, key)},
        "y": {key: name for key, name in ACCURACIES.items() if _known(rows, key)},
        "filters": {key: _values(rows, key) for key in FILTERS},
        "rows": rows,
    }


def embedded(content: Any) -> str:
    """JSON that may stand inside a script element, whatever text it holds."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def precision_maps(bench: dict[str, Any], artifacts: Artifacts) -> list[dict[str, Any]]:
    """By tower: layers downwards, artifacts sideways, bits in the cells."""
    names = {a["path"]: a for a in artifacts}
    maps = []
    for tower in ("image", "text"):
        rows = [r for r in bench["artifacts"] if r["tower"] == tower and r.get("layers")]
        if not rows:
            continue
        layers = list(dict.fromkeys(layer["name"] for row in rows for layer in row["layers"]))
        columns = [{layer["name"]: layer for layer in row["layers"]} for row in rows]
        maps.append(
            {
                "tower": tower,
                "artifacts": [names[row["path"]] for row in rows],
                "layers": [
                    {"name": name, "cells": [column.get(name) for column in columns]}
                    for name in layers
                ],
                "mean_bits": [_mean_bits(row["layers"]) for row in rows],
            }
        )
    return maps


def placements(artifacts: Artifacts) -> list[dict[str, Any]]:
    """Who ran how many operators, of each artifact, tower and host that told."""
    return [
        {
            "artifact": artifact,
            "row": row,
            "tower": row["tower"],
            "host": row.get("host"),
            "counts": counts,
        }
        for artifact in artifacts
        for row in artifact["rows"]
        if (counts := row.get("placement")) and row.get("scope") == "model"
    ]


def rooflines(artifacts: Artifacts) -> list[dict[str, Any]]:
    """Speed reached and its share of the machine's peaks, of each artifact, tower, threads."""
    return [
        {"artifact": artifact, "row": row, **row["roofline"]}
        for artifact in artifacts
        for row in artifact["rows"]
        if row.get("roofline")
    ]


def _mean_bits(layers: list[dict[str, Any]]) -> float | None:
    """Bits a weight, over all layers whose type is known."""
    known = [layer for layer in layers if layer["bits"]]
    total = sum(layer["num_weights"] for layer in known)
    return sum(layer["bits"] * layer["num_weights"] for layer in known) / total if total else None


def _scaled(key: str, value: float | None) -> float | None:
    return None if value is None else value * SCALES.get(key, 1)


def _known(rows: list[dict[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows)


def _values(rows: list[dict[str, Any]], key: str) -> list[Any]:
    """All values of a filter, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows if row[key] is not None))
