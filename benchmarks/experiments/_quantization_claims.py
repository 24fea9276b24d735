"""What the quantization experiment asked for, computed from its rows alone."""

from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.experiments._quantization_arms import OWN_RANGES, RUNTIMES, SPOILT

Rows = list[dict[str, Any]]
EIGHT_BIT_WEIGHTS = ("w8", "w8 whole rows", "w8 rescued", "w8 in 16s", "w8, texts in float")
BASELINES = {"w4": "w4 rtn", "w4 reconstructed": "w4 rtn", "w4 in 64s": "w4 in 64s rtn"}
"""4-bit weights -> the same groups, rounded to the nearest code."""
SIX_BITS = ("w6a6 adalog", "w6a6 adalog ends of 8", "w6a6 adalog erq", "w6a6 reconstructed")
WITH_VNNI = "w8a8 with VNNI, patch of 8 bits"
"""Rows of version 3 of the stage on a CPU whose 8-bit sums cannot overflow."""
LADDER = ("w4a4 uniform", "w4a4 repq", "mixed lrp", "w4a4 adalog", "w4a4 reconstructed")


def claims(rows: Rows) -> list[dict[str, Any]]:
    """Each figure of the goal that the rows allow; drops are float less quantized, in fractions."""
    found: list[dict[str, Any]] = []
    for model in ("teacher", "student"):
        found += _executed(rows, model)
        found += _simulated(rows, model)
    return [claim for claim in [*found, *_latency(rows)] if claim["rows"]]


def _executed(rows: Rows, model: str) -> list[dict[str, Any]]:
    found = []
    for runtime in RUNTIMES:
        of = lambda arm, r=runtime: _pick(rows, model=model, arm=arm, executed=True, runtime=r)  # noqa: E731
        goals = [
            ("w8a8", "top1", 0.003),
            *((arm, "top1", 0.003) for arm in ("w7a8", WITH_VNNI)),
            ("w8a8", "text_to_image_r1", 0.005),
            ("w8a8", "image_to_text_r1", 0.005),
            *((arm, "top1", 0.0005) for arm in EIGHT_BIT_WEIGHTS),
            *((arm, "top1", 0.005) for arm in BASELINES),
        ]
        for arm, key, goal in goals:
            name = f"{model}, {runtime}, {arm}: loss of {key}, executed"
            found.append(_drop(rows, model, of(arm), key, goal, name))
        for arm, plain in BASELINES.items():
            name = f"{model}, {runtime}: {arm} over round-to-nearest at its size, top1, executed"
            found.append(_gain(rows, of(arm), of(plain), 0.01, name))
        if runtime in OWN_RANGES:
            continue
        for arm in ("w8a8", "w7a8", WITH_VNNI):
            worst = [rows[i]["worst_cosine_to_simulation"] for i in of(arm)]
            name = f"{model}, {runtime}, {arm}: worst cosine of executed to simulated"
            found.append(_entry(name, min(worst, default=0.0), 0.999, "higher", "ratio", of(arm)))
    return found


def _simulated(rows: Rows, model: str) -> list[dict[str, Any]]:
    of = lambda arm: _pick(rows, model=model, arm=arm, executed=False)  # noqa: E731
    found = [
        _drop(rows, model, of(arm), "top1", 0.005, f"{model}, {arm}: loss of top1, simulated")
        for arm in SIX_BITS
    ]
    for provider in ("lrp", "fisher", "kl"):
        mixed = of(f"mixed {provider}")
        for other, goal in (("w4a4 repq", 0.02), ("mixed random", 0.0)):
            name = f"{model}: mixed 4-bit by {provider} over {other}, top1, simulated"
            found.append(_gain(rows, mixed, of(other), goal, name))
    for lower, higher in pairwise(LADDER):
        name = f"{model}: {higher} over {lower}, top1, simulated"
        found.append(_gain(rows, of(higher), of(lower), 0.0, name))
    for place in SPOILT:
        for arm, goal, better in (("plain", 0.9, "lower"), ("cured", 0.99, "higher")):
            which = of(f"outliers in {place}, {arm}")
            name = f"{model} with outliers in {place}, {arm}: cosine to float, simulated"
            value = _mean(rows, which, "image_cosine")
            found.append(_entry(name, value, goal, better, "ratio", which))
    return found


def _latency(rows: Rows) -> list[dict[str, Any]]:
    found = []
    for model in ("ViT-B-32", "ViT-B-16"):
        of = lambda label, m=model: _pick(rows, model=m, arm=f"latency {label}")  # noqa: E731
        for runtime in ("onnxruntime", "openvino"):
            stock = of(f"{runtime} stock int8")
            ours = [*of(f"{runtime} ours, dynamic"), *of(f"{runtime} ours, static")]
            if not stock or not ours:
                continue
            best = min(ours, key=lambda i: rows[i]["p50_ms"])
            value = rows[stock[0]]["p50_ms"] / rows[best]["p50_ms"]
            name = f"{model}, {runtime}: our int8's speed over the runtime's own"
            found.append(_entry(name, value, 1.0, "higher", "ratio", [best, *stock]))
            row = rows[best]
            ideal = 2 * row["num_macs"] / row["int8_peak_gflops"] / 1e6
            name = f"{model}, {runtime}: our int8's time over that of its products at the peak"
            found.append(_entry(name, row["p50_ms"] / ideal, 1.15, "lower", "ratio", [best]))
    return found


def _pick(rows: Rows, **wanted: Any) -> list[int]:
    return [
        i
        for i, row in enumerate(rows)
        if all(row.get(k) == v for k, v in wanted.items()) and "unavailable" not in row
    ]


def _mean(rows: Rows, which: list[int], key: str) -> float:
    return float(np.mean([rows[i][key] for i in which])) if which else 0.0


def _difference(rows: Rows, ours: list[int], theirs: list[int], key: str) -> float:
    return _mean(rows, ours, key) - _mean(rows, theirs, key)


def _drop(
    rows: Rows, model: str, which: list[int], key: str, goal: float, name: str
) -> dict[str, Any]:
    """Mean loss over the seeds; negative where the quantized model is better."""
    plain = _pick(rows, model=model, arm="float")
    value = _difference(rows, plain, which, key)
    return _entry(name, value, goal, "lower", "fraction", [*plain, *which] if which else [])


def _gain(rows: Rows, ours: list[int], theirs: list[int], goal: float, name: str) -> dict[str, Any]:
    """Mean top-1 of one arm over that of another; without rows where either was not run."""
    value = _difference(rows, ours, theirs, "top1")
    which = [*ours, *theirs] if ours and theirs else []
    return _entry(name, value, goal, "higher", "fraction", which)


def _entry(
    name: str, value: float, goal: float, better: str, unit: str, which: list[int]
) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "goal": goal,
        "unit": unit,
        "better": better,
        "holds": bool(value >= goal if better == "higher" else value <= goal),
        "rows": which,
    }
