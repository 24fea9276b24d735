"""What the distillation experiment claims, computed from its rows alone."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

SCRATCH = "scratch"
STEPS = ("plain", "reinforced, one caption", "reinforced, two captions", "teacher online")


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each figure that the experiment is for, computed from the rows alone."""
    arms = [row for row in rows if row.get("samples")]
    found = [_sample_ratio(rows), _kept(rows), *_same_time(rows)] if arms else []
    return found + [claim for claim in _step_claims(rows) if claim["rows"]]


def _which(rows: list[dict[str, Any]], **wanted: Any) -> list[int]:
    return [i for i, row in enumerate(rows) if all(row.get(k) == v for k, v in wanted.items())]


def _mean(rows: list[dict[str, Any]], which: Sequence[int], key: str) -> float:
    return statistics.fmean(rows[i][key] for i in which)


def _small(rows: list[dict[str, Any]]) -> list[str]:
    """Arms whose every student has at most a fifth of the teacher's parameters, in order."""
    teacher = rows[_which(rows, arm="teacher")[0]]["num_params"]
    large = {r["arm"] for r in rows if r.get("samples") and 5 * r["num_params"] > teacher}
    return [
        arm for arm in dict.fromkeys(r["arm"] for r in rows if r.get("samples")) if arm not in large
    ]


def _curve(rows: list[dict[str, Any]], arm: str) -> dict[int, float]:
    """Mean top-1 over the seeds, by samples."""
    budgets = sorted({row["samples"] for row in rows if row.get("arm") == arm})
    return {n: _mean(rows, _which(rows, arm=arm, samples=n), "top1") for n in budgets}


def _entry(
    name: str, value: float, goal: float, unit: str, better: str, which: list[int]
) -> dict[str, Any]:
    holds = value >= goal if better == "higher" else value <= goal
    about = {"name": name, "value": value, "goal": goal, "unit": unit, "better": better}
    return {**about, "holds": bool(holds), "rows": which}


def _sample_ratio(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fewest samples with which any arm's mean reaches scratch's at its full budget."""
    scratch = _curve(rows, SCRATCH)
    full = max(scratch)
    others = set(_small(rows)) - {SCRATCH}
    reached = [
        (samples, arm)
        for arm in sorted(others)
        for samples, top1 in _curve(rows, arm).items()
        if top1 >= scratch[full]
    ]
    samples, arm = min(reached, default=(full, SCRATCH))
    which = _which(rows, arm=SCRATCH, samples=full)
    if arm != SCRATCH:
        which += _which(rows, arm=arm, samples=samples)
    name = f"samples of '{arm}' to reach scratch's final top-1, over scratch's samples"
    return _entry(name, samples / full, 0.1, "ratio", "lower", which)


def _kept(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best arm's mean top-1 at its largest budget, over the teacher's."""
    teacher = _which(rows, arm="teacher")
    best = max(sorted(_small(rows)), key=lambda arm: max(_curve(rows, arm).values()))
    curve = _curve(rows, best)
    samples = max(curve, key=lambda n: curve[n])
    which = _which(rows, arm=best, samples=samples)
    ratio = rows[teacher[0]]["num_params"] / _mean(rows, which, "num_params")
    name = f"held-out-style top-1 of '{best}' ({ratio:.1f}x smaller) over the teacher's"
    value = curve[samples] / rows[teacher[0]]["top1"]
    return _entry(name, value, 0.95, "fraction", "higher", [*teacher, *which])


def _same_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each arm against scratch at the CPU time of scratch's full budget on the same machine.

    An arm that took longer at its largest budget counts with what it has by then, log-linear in
    time between the budgets before and after, as the table does with samples. An arm of another
    machine, or one that takes longer at its smallest budget, makes no claim.
    """
    full = max(_curve(rows, SCRATCH))
    scratch = _which(rows, arm=SCRATCH, samples=full)
    limit, found = _mean(rows, scratch, "train_cpu_seconds"), []
    machine = rows[scratch[0]].get("cpu")
    for arm in _small(rows):
        runs = [which for samples in _curve(rows, arm)
                if (which := _which(rows, arm=arm, samples=samples, cpu=machine))]  # fmt: skip
        times = [_mean(rows, which, "train_cpu_seconds") for which in runs]
        before = [n for n, seconds in enumerate(times) if seconds <= limit]
        if arm == SCRATCH or not before:
            continue
        last = before[-1]
        top1, used = _mean(rows, runs[last], "top1"), runs[last]
        if last + 1 < len(runs):
            part = math.log(limit / times[last]) / math.log(times[last + 1] / times[last])
            top1 += part * (_mean(rows, runs[last + 1], "top1") - top1)
            used = [*used, *runs[last + 1]]
        gain = top1 - _mean(rows, scratch, "top1")
        name = f"'{arm}' over scratch at equal time, top-1"
        found.append(_entry(name, gain, 0.0, "fraction", "higher", [*scratch, *used]))
    return found


def _step_claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    which = {kind: _which(rows, step=kind) for kind in STEPS}
    if not all(which.values()):
        return []
    cost = {k: statistics.median(rows[i]["cpu_seconds"] for i in w) for k, w in which.items()}
    found = []
    for kind, goal in ((STEPS[1], 1.05), (STEPS[2], 1.05)):
        name = f"cost of a step, {kind}, over a plain CLIP step"
        used = which["plain"] + which[kind]
        found.append(_entry(name, cost[kind] / cost["plain"], goal, "ratio", "lower", used))
        name = f"cost of a step, {kind}, over one with the teacher online"
        used = which["teacher online"] + which[kind]
        found.append(_entry(name, cost[kind] / cost["teacher online"], 0.5, "ratio", "lower", used))
    wait = statistics.median(rows[i]["store_seconds"] for i in which[STEPS[2]])
    name = "share of a reinforced step that reading the store takes"
    value = wait / cost[STEPS[2]]
    return [*found, _entry(name, value, 0.05, "fraction", "lower", which[STEPS[2]])]
