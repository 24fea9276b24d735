"""Geometry of the report's plots: numbers in, positions in an SVG out; colours are the template's.

Positions are in SVG user units, y downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LABEL_HEIGHT = 17
"""Distance at which two labels no longer touch."""


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis from a range of values to a range of positions."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            math.log(v) if self.logarithmic else v for v in (self.low, self.high, value)
        )
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 2)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values inside a range, a step of 1, 2 or 5 times a power of ten apart."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    while (high - low) / step > 1.5 * about:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return [value for value in candidates if low <= value <= high]


def scatter(
    points: Sequence[dict[str, Any]], width: float = 560, height: float = 360
) -> dict[str, Any]:
    """Accuracy (`y`, `y_ci`, fractions) against latency (`x`, `x_ci`, ms), better at the top left.

    Each point comes back with `cx`, `cy`, whisker ends and its label's place; `frontier` is the
    line through the points that no other beats in both.
    """
    xs = [value for p in points for value in (p["x"], *p["x_ci"])]
    ys = [value for p in points for value in (p["y"], *p["y_ci"])]
    margin = max(0.02, 0.15 * (max(ys) - min(ys)))
    x = Scale(min(xs) / 1.5, max(xs) * 1.9, 64, width - 16, logarithmic=True)
    y = Scale(max(0, min(ys) - margin), min(1, max(ys) + margin), height - 52, 16)
    placed = [
        {
            **p,
            "cx": x(p["x"]),
            "cy": y(p["y"]),
            "x_low": x(p["x_ci"][0]),
            "x_high": x(p["x_ci"][1]),
            "y_low": y(p["y_ci"][0]),
            "y_high": y(p["y_ci"][1]),
        }
        for p in points
    ]
    _place_labels(placed, width, (y.end, y.start))
    best, heights = frontier(points), ticks(y.low, y.high)
    return {
        "width": width,
        "height": height,
        "points": placed,
        "frontier": " ".join(f"{x(p['x'])},{y(p['y'])}" for p in best),
        "x_ticks": [{"at": x(v), "value": v} for v in log_ticks(x.low, x.high)],
        "y_ticks": [{"at": y(v), "value": v} for v in heights],
        "y_digits": 0 if all(round(100 * v, 6).is_integer() for v in heights) else 1,
    }


def _place_labels(points: list[dict[str, Any]], width: float, between: tuple[float, float]) -> None:
    """Labels stand right of their points, left of them near the edge, and off each other: the
    nearest free height of those `between` top and bottom; below one another where none is free.
    """
    used: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: p["cy"]):
        extent = 6.8 * len(point["label"])
        left = point["cx"] + 16 + extent > width
        x0 = point["cx"] - 12 - extent if left else point["cx"] + 12
        beside = [y for a, b, y in used if x0 < b and a < x0 + extent]
        heights = [point["cy"] + 4 + n * LABEL_HEIGHT for n in range(len(points) + 1)]
        heights += [2 * heights[0] - at for at in heights[1:]]
        free = [at for at in heights if all(abs(at - y) >= LABEL_HEIGHT for y in beside)]
        inside = [at for at in free if between[0] <= at <= between[1]] or free
        at = min(inside, key=lambda at: (abs(at - heights[0]), -at))
        used.append((x0, x0 + extent, at))
        point["label_x"] = point["cx"] + (-12 if left else 12)
        point["label_y"] = at
        point["anchor"] = "end" if left else "start"
        point["moved"] = abs(at - heights[0]) >= LABEL_HEIGHT


def frontier(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points that no other beats in both latency and accuracy, fastest first."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["x"], -p["y"])):
        if not best or point["y"] > best[-1]["y"]:
            best.append(point)
    return best


def bars(
    groups: Sequence[dict[str, Any]], width: float = 560, stacked: bool = False
) -> dict[str, Any]:
    """Horizontal bars: groups with a `label` and `parts` ({"name", "value", "ci"?}), from zero.

    Stacked parts share a bar, others stand below each other.
    """
    totals = [sum(p["value"] for p in g["parts"]) for g in groups]
    singles = [p.get("ci", [0, p["value"]])[1] for g in groups for p in g["parts"]]
    highest = max(totals if stacked else singles)
    x = Scale(0, highest, 170, width - 84)
    thickness, gap, at = (20 if stacked else 14), 20, 8.0
    rows = []
    for group, total in zip(groups, totals):
        parts, offset, top = [], 0.0, at
        for part in group["parts"]:
            begin = offset if stacked else 0.0
            whisker = {"low": x(part["ci"][0]), "high": x(part["ci"][1])} if "ci" in part else {}
            place = {"y": at, "x": x(begin), "width": round(x(begin + part["value"]) - x(begin), 2)}
            parts.append({**part, **place, **whisker})
            offset += part["value"]
            at += 0 if stacked else thickness + 2
        at += thickness if stacked else -2
        rows.append(
            {**group, "parts": parts, "total": total, "end": x(total), "middle": (top + at) / 2}
        )
        at += gap
    return {
        "width": width,
        "height": at - gap + 8,
        "thickness": thickness,
        "rows": rows,
        "zero": x(0),
    }


def curve(
    steps: Sequence[float], values: Sequence[float], width: float = 300, height: float = 96
) -> dict[str, Any]:
    """A line over steps with its first and last value; long logs are thinned to 300 points."""
    stride = max(1, len(steps) // 300)
    kept = sorted({*range(0, len(steps), stride), len(steps) - 1})
    low, high = min(values), max(values)
    x = Scale(steps[0], max(steps[-1], steps[0] + 1), 4, width - 4)
    y = Scale(low, high if high > low else low + 1, height - 6, 8)
    line = " ".join(f"{x(steps[i])},{y(values[i])}" for i in kept)
    ends = {"first": values[0], "last": values[-1], "steps": steps[-1]}
    return {"width": width, "height": height, "line": line, **ends}
