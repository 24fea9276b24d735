"""What the rows of the matrix of targets show: towers that pass, time and memory of an export."""

from collections.abc import Callable
from typing import Any

STUDENT = "embedded student"
ON_LINUX = ("onnx", "onnxruntime", "openvino", "executorch", "litert", "mnn", "web")
"""Targets that must pass for both towers of every model on a Linux CPU."""
FURTHER: dict[str, Callable[[dict[str, Any]], bool]] = {
    "ncnn: towers of transformers shown to pass": lambda row: (
        row["target"] == "ncnn" and (row["source"], row["tower"]) != ("MobileCLIP2-S0", "image")
    ),
    "coreml: towers converted, their parity simulated": lambda row: row["target"] == "coreml",
    "tensorrt: fp16 and int8 engines built, their parity simulated": lambda row: (
        row["target"] == "tensorrt" and row["precision"] in ("fp16", "int8")
    ),
}
"""What of the other targets must hold away from their own systems."""
MINUTES = {STUDENT: 5, "ViT-B/16": 15}
LARGE_BYTES = 100_000_000
"""Weights beside which Python and its libraries weigh little."""

Rows = list[dict[str, Any]]


def claims(rows: Rows) -> list[dict[str, Any]]:
    """Share of towers shown to pass, per target; time and memory of an export."""
    made = []
    for target in ON_LINUX:
        indices = [i for i, row in enumerate(rows) if _counts(row, target)]
        if indices:
            share = sum(rows[i]["passed"] for i in indices) / len(indices)
            made.append(_claim(f"{target}: towers shown to pass", share, 1.0, "fraction", indices))
    for name, asked in FURTHER.items():
        indices = [i for i, r in enumerate(rows) if asked(r) and r["kind"] != "no source"]
        if indices:
            share = sum(rows[i]["passed"] for i in indices) / len(indices)
            made.append(_claim(name, share, 1.0, "fraction", indices))
    for source, minutes in MINUTES.items():
        indices = [
            i
            for i, row in enumerate(rows)
            if row["source"] == source and row["tower"] == "image" and "seconds" in row
        ]
        if indices and not _misses_a_target(rows, source):
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
    """Whether a row says something of a target: its source opens.

    A runtime that is not here and a case that was not run are failures: nothing was shown.
    """
    return bool(row["target"] == target and row["kind"] != "no source")


def _misses_a_target(rows: Rows, source: str) -> bool:
    """Whether some target's first precision was not run, so that a sum of times says little."""
    first: dict[str, str] = {}
    for row in rows:
        if row["source"] == source:
            first.setdefault(row["target"], row["kind"])
    return "not run" in first.values()


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
