"""What the rows of the matrix of targets show: towers that pass, time and memory of an export."""

from collections.abc import Callable
from typing import Any

STUDENT = "embedded student"
ON_LINUX = ("onnx", "onnxruntime", "openvino", "executorch", "litert", "mnn", "web")
"""Targets that must pass for both towers of every model on a Linux CPU."""
BOTH_PRECISIONS = "tensorrt: fp16 and int8 engines built, their parity simulated"
FURTHER: dict[str, Callable[[dict[str, Any]], bool]] = {
    "ncnn: towers of transformers shown to pass": lambda row: (
        row["target"] == "ncnn" and (row["source"], row["tower"]) != ("MobileCLIP2-S0", "image")
    ),
    "coreml: towers converted, their parity simulated": lambda row: row["target"] == "coreml",
    BOTH_PRECISIONS: lambda row: (
        row["target"] == "tensorrt" and row["precision"] in ("fp16", "int8")
    ),
}
"""What of the other targets must hold away from their own systems."""
LARGE = "ViT-B/16"
MINUTES = {STUDENT: 5, LARGE: 15}
LARGE_BYTES = 100_000_000
"""Weights beside which Python and its libraries weigh little."""

Rows = list[dict[str, Any]]


def claims(rows: Rows) -> list[dict[str, Any]]:
    """Share of towers shown to pass, per target; time and memory of an export."""
    made = []
    firsts = _firsts(rows)
    for target in ON_LINUX:
        indices = [i for i, row in enumerate(rows) if _counts(row, target)]
        made += _shown(f"{target}: towers shown to pass", rows, indices, firsts)
    for name, asked in FURTHER.items():
        indices = [i for i, r in enumerate(rows) if asked(r) and r["kind"] != "no source"]
        whole = set(indices) if name == BOTH_PRECISIONS else firsts
        made += _shown(name, rows, indices, whole)
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
    timed = [i for i in large if rows[i]["source"] == LARGE]
    for of, indices in ((LARGE, timed), ("all large models", large)):
        if indices:
            worst = max(rows[i]["peak_memory_bytes"] / rows[i]["weights_bytes"] for i in indices)
            name = f"memory an export adds, over the weights, worst case of {of}"
            made.append(_claim(name, worst, 4.0, "ratio", indices, "lower"))
    return made


def _shown(name: str, rows: Rows, indices: list[int], firsts: set[int]) -> list[dict[str, Any]]:
    """The share of towers that pass: of each model in one precision, and in every precision."""
    of_each = [i for i in indices if i in firsts]
    parts = [(", one precision a model", of_each), (", every precision", indices)]
    if of_each == indices:
        parts = [("", indices)]
    return [
        _claim(
            f"{name}{of}", sum(rows[i]["passed"] for i in part) / len(part), 1.0, "fraction", part
        )
        for of, part in parts
        if part
    ]


def _firsts(rows: Rows) -> set[int]:
    """Rows of the first precision of each target on each model."""
    first: dict[tuple[str, str], str | None] = {}
    for row in rows:
        first.setdefault((row["source"], row["target"]), row["precision"])
    return {i for i, r in enumerate(rows) if first[r["source"], r["target"]] == r["precision"]}


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
