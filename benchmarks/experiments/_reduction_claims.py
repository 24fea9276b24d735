"""The issue's figures on fewer tokens, each recomputed from the rows of the results file."""

from typing import Any

from benchmarks.experiments import _reduction_accuracy as accuracy

Rows = list[dict[str, Any]]
DEFAULT = "guarded"
"""The method that `prune_tokens` takes if none is named."""
RECOVERED = "recovered 0.60"
"""The arm of training that uses it."""
BEST = "exact + guarded 0.45"
"""The variant whose speed the claims are about."""
LEAST_COSINE = 0.99
"""To the torch model: a file further from it is fast at computing something else."""


def claims(rows: Rows) -> list[dict[str, Any]]:
    """The issue's figures, each with the rows it comes from; a part that wasn't run makes none."""
    found = [
        _kept("default, 0.75 of the multiply-adds, no training: worst loss", rows),
        _recovered(rows),
        _regions(rows),
        _speed("B/16", rows),
        _speed("L/14@336", rows),
        *[_near_ideal(target, rows) for target in ("onnxruntime", "openvino")],
        _largest("exact passes: largest change of an embedding", "exact", 1e-4, "absolute", rows),
        _vocabulary(rows),
        _parity(rows),
    ]
    return [claim for claim in found if claim is not None]


def _pick(rows: Rows, **wanted: Any) -> list[int]:
    return [n for n, row in enumerate(rows) if all(row.get(k) == v for k, v in wanted.items())]


def _claim(
    name: str, value: float, goal: float, unit: str, better: str, which: list[int]
) -> dict[str, Any]:
    holds = value >= goal if better == "higher" else value <= goal
    return {
        "name": name,
        "value": value,
        "goal": goal,
        "unit": unit,
        "better": better,
        "holds": bool(holds),
        "rows": which,
    }


def _kept(name: str, rows: Rows) -> dict[str, Any] | None:
    """Top-1 of the full tower less that of the default schedule, the worse of both tasks."""
    whole = _pick(rows, part="accuracy", arm="none")
    fewer = _pick(rows, part="accuracy", arm=f"{accuracy.EXACT}{DEFAULT} 0.75")
    if not whole or not fewer:
        return None
    full = {rows[n]["split"]: rows[n]["top1"] for n in whole}
    worst = max(full[rows[n]["split"]] - rows[n]["top1"] for n in fewer)
    return _claim(name, worst, 0.005, "fraction", "lower", whole + fewer)


def _recovered(rows: Rows) -> dict[str, Any] | None:
    """Top-1 of the full tower less the mean over seeds after training, the worse of both tasks."""
    whole = _pick(rows, part="accuracy", arm="none")
    which = _pick(rows, part="recovery", arm=RECOVERED, artifact="student")
    if not whole or not which:
        return None
    losses = []
    for n in whole:
        own = [rows[k]["top1"] for k in which if rows[k]["split"] == rows[n]["split"]]
        losses.append(rows[n]["top1"] - sum(own) / len(own))
    seeds = len({rows[n]["seed"] for n in which})
    name = f"default, 0.6 of the multiply-adds, after recovery: worst loss, mean of {seeds} seed(s)"
    return _claim(name, max(losses), 0.005, "fraction", "lower", whole + which)


def _regions(rows: Rows) -> dict[str, Any] | None:
    which = [n for n in _pick(rows, part="accuracy", method=DEFAULT) if rows[n]["macs"] >= 0.5]
    if not which:
        return None
    worst = max(rows[n]["worst_lost_regions"] for n in which)
    name = "default: largest share of a picture's regions that no token holds"
    return _claim(name, worst, 0.0, "fraction", "lower", which)


def _speed(model: str, rows: Rows) -> dict[str, Any] | None:
    """Processor time of ONNX Runtime's float32 over that of the fastest reduced int8 file."""
    base = _pick(
        rows, part="latency", model=model, variant="full", target="onnxruntime", precision="fp32"
    )
    fast = _pick(rows, part="latency", model=model, variant=BEST, precision="int8")
    fast = [n for n in fast if rows[n].get("cosine", 1.0) >= LEAST_COSINE]
    if not base or not fast:
        return None
    best = min(fast, key=lambda n: rows[n]["processor_p50_ms"])
    ratio = rows[base[0]]["processor_p50_ms"] / rows[best]["processor_p50_ms"]
    name = f"{model}: int8 + tokens + exact passes over ONNX Runtime fp32, 1 thread"
    return _claim(name, ratio, 7.0, "ratio", "higher", [*base, best])


def _near_ideal(target: str, rows: Rows) -> dict[str, Any] | None:
    """Worst of all schedules: speed-up in int8 over the same file whole, by 1 / share of MACs."""
    found: list[tuple[float, list[int]]] = []
    for model in ("B/16", "L/14@336"):
        own = _pick(rows, part="latency", model=model, target=target, precision="int8")
        whole = [n for n in own if rows[n]["variant"] == "full"]
        for n in own:
            if rows[n]["variant"] in ("full", "exact") or not whole:
                continue
            speed = rows[whole[0]]["processor_p50_ms"] / rows[n]["processor_p50_ms"]
            found.append((speed * rows[n]["macs"], [whole[0], n]))
    if not found:
        return None
    value, which = min(found)
    name = f"{target}: measured speed-up over 1 / share of multiply-adds, worst schedule"
    return _claim(name, value, 0.9, "ratio", "higher", which)


def _largest(name: str, part: str, goal: float, unit: str, rows: Rows) -> dict[str, Any] | None:
    which = [n for n in _pick(rows, part=part) if "largest_change" in rows[n]]
    if not which:
        return None
    value = max(rows[n]["largest_change"] for n in which)
    return _claim(name, value, goal, unit, "lower", which)


def _vocabulary(rows: Rows) -> dict[str, Any] | None:
    """Bytes that went less those of the table rows that went: 0 if nothing else changed size."""
    which = [n for n in _pick(rows, part="exact") if "table_bytes" in rows[n]]
    if not which:
        return None
    worst = max(abs(rows[n]["saved_bytes"] - rows[n]["table_bytes"]) for n in which)
    name = "vocabulary trimming: bytes saved less the table's, ids and embeddings unchanged"
    return _claim(name, float(worst), 0.0, "bytes", "lower", which)


def _parity(rows: Rows) -> dict[str, Any] | None:
    """Cases that an installed runtime did not pass; one that cannot run here is no case."""
    which = [n for n in _pick(rows, part="parity") if rows[n]["kind"] != "unavailable"]
    if not which:
        return None
    failed = sum(not rows[n]["passed"] for n in which)
    name = "reduced models: cases of method, runtime and precision that miss their parity gate"
    return _claim(name, float(failed), 0.0, "cases", "lower", which)
