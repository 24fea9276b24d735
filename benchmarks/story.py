"""What the figures of a run say, in words: verdict, tiles, warnings, and what each stage did."""

import json
from pathlib import Path
from typing import Any

from benchmarks import charts, placement
from benchmarks.labels import (
    describe_metric,
    interval,
    megabytes,
    milliseconds,
    percent,
    times,
    times_interval,
)

Artifacts = list[dict[str, Any]]


def chosen(artifacts: Artifacts) -> dict[str, Any] | None:
    """The artifact of the verdict: the student's fastest bundle, else the teacher's own export."""
    timed = [a for a in artifacts if a["towers"]["image"]["p50_ms"] is not None]
    students = [a for a in timed if a["artifact"] == "student"]
    others = [a for a in timed if not _is_baseline(a)]
    return min(students or others, key=lambda a: a["towers"]["image"]["p50_ms"], default=None)


def baseline(artifacts: Artifacts) -> dict[str, Any] | None:
    """The teacher in ONNX Runtime, float32: what speed-ups and sizes refer to."""
    return next((a for a in artifacts if _is_baseline(a)), None)


def teacher(artifacts: Artifacts) -> dict[str, Any] | None:
    """The torch teacher: what accuracy is compared with."""
    found = (a for a in artifacts if (a["artifact"], a["target"]) == ("teacher", "torch"))
    return next(found, None)


def _is_baseline(artifact: dict[str, Any]) -> bool:
    return artifact["path"].startswith("teacher/")


def verdict(artifacts: Artifacts, best: dict[str, Any] | None, metric: str | None) -> str:
    """The run in one sentence."""
    if best is None:
        bundles = [a for a in artifacts if a["target"] != "torch" and not a["unavailable"]]
        why = "no evaluation data" if metric is None else "no bundle"
        return f"{len(bundles)} bundles written; nothing was timed, as the run has {why}."
    parts = [
        _speed(best),
        _size(best, baseline(artifacts)),
        _kept(best, teacher(artifacts), metric),
    ]
    said = [part for part in parts if part]
    joined = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return f"{best['name'].replace(' · ', ', ')}: {joined}."


def _speed(best: dict[str, Any]) -> str:
    ratio = best["towers"]["image"]["speedup"]
    if ratio is None:
        return f"{milliseconds(best['towers']['image']['p50_ms'])} an image"
    return f"{times(ratio)} faster" if ratio >= 1 else f"{times(1 / ratio)} slower"


def _size(best: dict[str, Any], reference: dict[str, Any] | None) -> str:
    if not reference or not reference["size_bytes"] or not best["size_bytes"]:
        return ""
    ratio = reference["size_bytes"] / best["size_bytes"]
    return f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} larger"


def _kept(best: dict[str, Any], other: dict[str, Any] | None, metric: str | None) -> str:
    own = best["towers"]["image"].get(metric or "")
    whole = other["towers"]["image"].get(metric or "") if other else None
    if own is None or not whole:
        return ""
    return f"keeps {percent(own / whole, 0)} of the teacher's {describe_metric(metric)}"


def tiles(
    artifacts: Artifacts, best: dict[str, Any] | None, metric: str | None
) -> list[dict[str, str]]:
    """The figures behind the verdict: `value`, `label`, `detail`, `note` (shown on hover)."""
    if best is None:
        return []
    row, reference, other = best["towers"]["image"], baseline(artifacts), teacher(artifacts)
    found = []
    if row["speedup"] is not None and reference:
        slow = reference["towers"]["image"]["p50_ms"]
        found.append(
            {
                "value": times(row["speedup"]),
                "label": "image tower speed",
                "detail": f"{milliseconds(slow)} → {milliseconds(row['p50_ms'])} an image",
                "note": f"95 % interval {times_interval(row['speedup_ci95'])}. Median of "
                f"{row['num_queries']} queries, batch 1, {row['threads']} thread(s), against the "
                "teacher in ONNX Runtime fp32, timed in the same rounds.",
            }
        )
    if reference and reference["size_bytes"] and best["size_bytes"]:
        found.append(
            {
                "value": times(reference["size_bytes"] / best["size_bytes"]),
                "label": "smaller files",
                "detail": f"{megabytes(reference['size_bytes'])} → {megabytes(best['size_bytes'])}",
                "note": "Image and text tower together, against the teacher's fp32 files.",
            }
        )
    if metric and other and row.get(metric) is not None:
        whole = other["towers"]["image"][metric]
        found.append(
            {
                "value": percent(row[metric]),
                "label": describe_metric(metric),
                "detail": f"teacher {percent(whole)}: {percent(row[metric] / whole, 0)} kept"
                if whole
                else f"teacher {percent(whole)}",
                "note": f"95 % interval {interval(row[f'{metric}_ci95'])}, measured on the "
                "exported files themselves.",
            }
        )
    worst = [t["parity_worst_cosine"] for t in best["towers"].values()]
    if all(value is not None for value in worst):
        found.append(
            {
                "value": f"{min(worst):.4f}",
                "label": "worst export cosine",
                "detail": "files against their torch model",
                "note": "Lowest cosine similarity between an embedding of the exported file and "
                "of the torch model it was made from; 1 means nothing was lost in export.",
            }
        )
    return found


def warnings(bench: dict[str, Any], artifacts: Artifacts) -> list[str]:
    """What a careful reader should know about these timings."""
    names = {a["path"]: a["name"] for a in artifacts}
    found = []
    for timing in bench["timings"]:
        where = f"{names.get(timing['path'], timing['path'])}, {timing['tower']} tower"
        if "p50_ms" not in timing:
            found.append(f"{where}: not timed ({timing['unavailable']}).")
            continue
        low, high = timing["p50_ms_ci95"]
        if (high - low) / 2 > 0.05 * timing["p50_ms"]:
            half = (high - low) / 2 / timing["p50_ms"]
            found.append(f"{where}: the median is known to ±{percent(half, 0)} only.")
        if abs(timing["drift"] - 1) > 0.1:
            change = percent(timing["drift"] - 1, 0)
            found.append(f"{where}: speed drifted by {change} during the measurement.")
        elsewhere = placement.warning(timing.get("placement"))
        if elsewhere:
            found.append(f"{where}: {elsewhere}.")
        if not timing["enough_queries"]:
            found.append(f"{where}: fewer queries than asked for ({timing['num_queries']}).")
    hot = [name for name, host in bench.get("hosts", {}).items() if host.get("throttled")]
    found += [f"{name}: everything became slower meanwhile: was it throttled?" for name in hot]
    busy = bench["disturbance"].get("cores_busy")
    if busy is not None and busy > 1.3:
        found.insert(0, _busy(busy, chosen(artifacts)))
    return found


def _busy(cores: float, best: dict[str, Any] | None) -> str:
    """Processor time tells what the machine would do if it were idle."""
    said = f"Other programs kept {cores - 1:.1f} cores busy: the milliseconds are too high."
    row = best["towers"]["image"] if best else {}
    if row.get("processor_speedup") is None:
        return said
    return (
        f"{said} In processor time, which leaves out waiting for a core, the image tower takes "
        f"{milliseconds(row['processor_p50_ms'])} and is {times(row['processor_speedup'])} as fast "
        "as the teacher's."
    )


def stages(
    run_dir: Path,
    summary: dict[str, Any],
    bench: dict[str, Any],
    artifacts: Artifacts,
    metric: str | None,
) -> list[dict[str, Any]]:
    """Teacher, each stage, in order: parameters, accuracy, seconds and the loss curve."""
    first = teacher(artifacts)
    if first is None:
        return []
    between = {
        row["folder"]: {"num_macs": row.get("num_macs", {}).get("image"), **row["accuracy"]}
        for row in bench["stages"]
    }
    students = [a for a in artifacts if (a["artifact"], a["target"]) == ("student", "torch")]
    found = [_stage("teacher", first["num_params"], first["towers"]["image"], metric)]
    for folder in sorted(path.parent for path in run_dir.glob("[0-9][0-9]-*/metrics.json")):
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        last = bool(students) and students[0]["path"] == folder.name
        figures = students[0]["towers"]["image"] if last else between.get(folder.name, {})
        stage = {
            **_stage(folder.name, metrics.get("num_params"), figures, metric),
            "seconds": summary["seconds"].get(folder.name),
            "loss": _loss(folder / "log.jsonl"),
            "tried": _tried(folder / "fallback.json"),
        }
        found.append(stage | _change(found[-1], stage))
    return found


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
