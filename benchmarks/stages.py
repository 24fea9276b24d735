"""What each stage of a run cost and bought."""

import json
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.labels import times
from benchmarks.raw import Places
from benchmarks.story import Artifacts, teacher


def stages(
    run_dir: Path,
    summary: dict[str, Any],
    bench: dict[str, Any],
    artifacts: Artifacts,
    metric: str | None,
    places: Places,
) -> list[dict[str, Any]]:
    """Teacher, each stage, in order: parameters, accuracy, seconds, loss curve, raw `places`."""
    first = teacher(artifacts)
    if first is None:
        return []
    between = {
        row["folder"]: {"num_macs": row.get("num_macs", {}).get("image"), **row["accuracy"]}
        for row in bench["stages"]
    }
    students = [a for a in artifacts if (a["artifact"], a["target"]) == ("student", "torch")]
    image = first["towers"]["image"]
    start = _places(places, image, "", metric)
    found = [_stage("teacher", first["num_params"], image, metric) | {"places": start}]
    for folder in sorted(path.parent for path in run_dir.glob("[0-9][0-9]-*/metrics.json")):
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        last = bool(students) and students[0]["path"] == folder.name
        own = students[0]["towers"]["image"] if last else {}
        figures = own or between.get(folder.name, {})
        stage = {
            **_stage(folder.name, metrics.get("num_params"), figures, metric),
            "seconds": summary["seconds"].get(folder.name),
            "loss": _loss(folder / "log.jsonl"),
            "tried": _tried(folder / "fallback.json"),
            "places": _places(places, own, folder.name, metric),
        }
        found.append(stage | _change(found[-1], stage))
    return found


def _places(
    places: Places, row: dict[str, Any], folder: str, metric: str | None
) -> dict[str, str | None]:
    """Where the figures of a model stand: the teacher, the last stage, or one between them."""
    params = f"{folder}/metrics.json" if folder else places.artifact(row, "num_params")
    if row:
        macs = places.artifact(row, "num_macs")
        return {
            "num_params": params,
            "num_macs": macs,
            "accuracy": places.accuracy(row, metric or ""),
        }
    return {
        "num_params": params,
        "num_macs": places.stage(folder, "num_macs", "image"),
        "accuracy": places.stage(folder, "accuracy", metric or ""),
    }


def _change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a stage cost and bought: accuracy in points, parameters and work as factors."""
    cost = None
    if after["accuracy"] is not None and before["accuracy"] is not None:
        points = 100 * (after["accuracy"] - before["accuracy"])
        cost = f"{points:+.1f} points"
    factors = {}
    for key in ("num_params", "num_macs"):
        known = before[key] and after[key]
        ratio = before[key] / after[key] if known else None
        factors[f"{key}_change"] = "" if ratio is None else _factor(ratio)
    return {"accuracy_change": cost or "", **factors}


def _factor(ratio: float) -> str:
    """`4.2x fewer`, `1.5x more`, or nothing where it stayed."""
    if abs(ratio - 1) < 0.005:
        return "unchanged"
    return f"{times(ratio)} fewer" if ratio > 1 else f"{times(1 / ratio)} more"


def _stage(
    folder: str, num_params: int | None, figures: dict[str, Any], metric: str | None
) -> dict[str, Any]:
    return {
        "folder": folder,
        "name": folder.split("-", 1)[-1].replace("_", " "),
        "num_params": num_params,
        "num_macs": figures.get("num_macs"),
        "num_params_change": "",
        "num_macs_change": "",
        "accuracy_change": "",
        "accuracy": figures.get(metric or ""),
        "accuracy_ci95": figures.get(f"{metric}_ci95"),
        "seconds": None,
        "loss": None,
        "tried": [],
    }


def _tried(path: Path) -> list[str]:
    """What a quantization with gates tried, one line a step, with the reason for the next."""
    if not path.exists():
        return []
    return [
        f"{step['rung']}: {step['reason'] or 'taken'}"
        for step in json.loads(path.read_text(encoding="utf-8"))
    ]


def _loss(path: Path) -> dict[str, Any] | None:
    """The loss curve of a training stage, from the lines of its log that have one."""
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    kept = [line for line in lines if "step" in line and "loss" in line]
    if len(kept) < 2:
        return None
    return charts.curve([line["step"] for line in kept], [line["loss"] for line in kept])
