"""What the figures of a run say, in words: the verdict, and what to read with care."""

from typing import Any

from benchmarks import placement
from benchmarks.labels import (
    TARGETS,
    describe_metric,
    milliseconds,
    percent,
    times,
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
    found += _slower_than_float(artifacts)
    busy = bench["disturbance"].get("cores_busy")
    if busy is not None and busy > 1.3:
        found.insert(0, _busy(busy, chosen(artifacts)))
    return found


def _slower_than_float(artifacts: Artifacts) -> list[str]:
    """Files of fewer bits that take longer than float32 of the same model, surely: integers gain
    nothing on a processor without integer products.
    """
    found = []
    for artifact in artifacts:
        for tower, row in artifact["towers"].items():
            floats = [
                (other["towers"][tower], other["target"])
                for other in artifacts
                if (other["artifact"], other["precision"]) == (artifact["artifact"], "fp32")
                and other["towers"][tower].get("p50_ms")
            ]
            if artifact["precision"] == "fp32" or not row.get("p50_ms") or not floats:
                continue
            fastest, target = min(floats, key=lambda pair: pair[0]["p50_ms"])
            if row["p50_ms_ci95"][0] > fastest["p50_ms_ci95"][1]:
                found.append(
                    f"{artifact['name']}, {tower} tower: slower than the float32 file in "
                    f"{TARGETS.get(target, target)} ({milliseconds(row['p50_ms'])} against "
                    f"{milliseconds(fastest['p50_ms'])}); on this machine it saves space, not time."
                )
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
