"""The table of the distillation experiment: what each arm reaches with how many samples."""

import math
import statistics
from itertools import pairwise
from typing import Any

from benchmarks.labels import NOTHING, percent

Rows = list[dict[str, Any]]


def distillation(rows: Rows) -> list[str]:
    """An arm a row, a budget of samples a column: mean top-1 and half its range over the seeds."""
    from benchmarks.results_tables import table

    arms = [row for row in rows if row.get("samples") is not None]
    budgets = sorted({row["samples"] for row in arms})
    final = _mean(_scratch(arms), "top1")
    heads = ["arm", "parameters", *(f"{n:,} samples" for n in budgets)]
    heads += ["CPU seconds", "samples for scratch's final"]
    lines = []
    for name in dict.fromkeys(row["arm"] for row in arms):
        own = [row for row in arms if row["arm"] == name]
        cells = [_top1([row for row in own if row["samples"] == n]) for n in budgets]
        most = [row for row in own if row["samples"] == max(row["samples"] for row in own)]
        size = _mean(most, "num_params") / 1e6
        seconds = _mean(most, "train_cpu_seconds")
        needed = samples_needed(own, final)
        shown = NOTHING if needed is None else f"{needed:,.0f}"
        lines.append([name, f"{size:.2f} M", *cells, f"{seconds:.0f}", shown])
    teacher = next(row for row in rows if row.get("arm") == "teacher")
    note = f"The teacher ({teacher['num_params'] / 1e6:.2f} M) has {percent(teacher['top1'])} of "
    note += (
        "the held-out style right. Mean over the seeds and half their range; parameters and CPU "
    )
    note += "seconds are those of the largest budget; samples in between by log-linear "
    note += "interpolation. A calibration pair counts as a sample."
    return [note, "", *table(heads, lines)]


def samples_needed(own: Rows, wanted: float) -> float | None:
    """Samples with which an arm's mean top-1 reaches `wanted`; None if it never does."""
    budgets = sorted({row["samples"] for row in own})
    curve = [(n, _mean([r for r in own if r["samples"] == n], "top1")) for n in budgets]
    if curve[0][1] >= wanted:
        return float(budgets[0])
    for (few, low), (many, high) in pairwise(curve):
        if high >= wanted:
            part = (wanted - low) / (high - low)
            return math.exp(math.log(few) + part * (math.log(many) - math.log(few)))
    return None


def _scratch(arms: Rows) -> Rows:
    own = [row for row in arms if row["arm"] == "scratch"]
    return [row for row in own if row["samples"] == max(row["samples"] for row in own)]


def _mean(rows: Rows, key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _top1(rows: Rows) -> str:
    if not rows:
        return NOTHING
    values = [row["top1"] for row in rows]
    if len(values) == 1:
        return f"{100 * values[0]:.1f} % (one seed)"
    spread = (max(values) - min(values)) / 2
    return f"{100 * statistics.fmean(values):.1f} ± {100 * spread:.1f} %"
