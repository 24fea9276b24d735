"""Accuracy against cost for docs/reduction.md: every method and ratio, a panel for each task."""

from typing import Any

from benchmarks.charts import Scale, ticks
from benchmarks.experiments._reduction_latency import TEACHER

COLOURS = ("#0b6e99", "#c4481c", "#3a7d34", "#7a4fa3", "#a8801f", "#b3326b", "#4d5a66", "#20928a")
TITLES = {"held_out_style": "held-out style", "val": "held-out pictures (val)"}
WIDE, HIGH, LEFT = 380, 340, 50
"""Of one panel, and its margin for the axis."""
TOP, BOTTOM = 34, 296

Rows = list[dict[str, Any]]
Point = tuple[float, float, str]
"""Cost, top-1, arm."""


def pareto(rows: Rows) -> str:
    """Top-1 against the image tower's latency, or multiply-adds where it was not measured."""
    cost = costs(rows)
    unit = "ms, ONNX Runtime int8, one thread" if timed(rows) else "share of multiply-adds"
    own = [r for r in rows if r["part"] == "accuracy" and r["arm"] in cost]
    methods = list(dict.fromkeys(legend(row) for row in own))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDE + 190} {HIGH}" '
        f'font-family="sans-serif" font-size="12"><rect width="{2 * WIDE + 190}" '
        f'height="{HIGH}" fill="#fff"/>'
    ]
    for n, split in enumerate(dict.fromkeys(row["split"] for row in own)):
        groups: dict[str, list[Point]] = {}
        for row in own:
            if row["split"] == split:
                point = (cost[row["arm"]], row["top1"], row["arm"])
                groups.setdefault(legend(row), []).append(point)
        parts += _panel(n * WIDE, TITLES.get(split, split), unit, groups, methods)
    for n, method in enumerate(methods):
        y = 44 + 20 * n
        parts.append(_mark(2 * WIDE + 16, y, n, method))
        parts.append(f'<text x="{2 * WIDE + 28}" y="{y + 4}">{method}</text>')
    return "".join([*parts, "</svg>\n"])


def timed(rows: Rows) -> bool:
    """Whether the arms were timed."""
    return any(row["part"] == "latency" and row["model"] == TEACHER for row in rows)


def costs(rows: Rows) -> dict[str, float]:
    """Arm -> milliseconds; where none was timed, its share of the multiply-adds."""
    if not timed(rows):
        return {row["arm"]: row["macs"] for row in rows if row["part"] == "accuracy"}
    own = [r for r in rows if r["part"] == "latency" and r["model"] == TEACHER]
    return {row["variant"]: row["processor_p50_ms"] for row in own}


def legend(row: dict[str, Any]) -> str:
    """What a point is grouped with: its method, with or without the exact passes."""
    return ("exact + " if row["arm"].startswith("exact + ") else "") + str(row["method"])


def _panel(
    left: float, title: str, unit: str, groups: dict[str, list[Point]], methods: list[str]
) -> list[str]:
    points = [point for group in groups.values() for point in group]
    x_values, y_values = [p[0] for p in points], [p[1] for p in points]
    start, end = left + LEFT, left + WIDE - 14
    x = Scale(min(x_values) * 0.97, max(x_values) * 1.02, start, end)
    y = Scale(min(y_values) - 0.01, max(y_values) + 0.01, BOTTOM, TOP)
    parts = [f'<text x="{(start + end) / 2}" y="20" text-anchor="middle">{title}</text>']
    for value in ticks(y.low, y.high):
        parts.append(f'<path d="M{start} {y(value)}H{end}" stroke="#ddd"/>')
        parts.append(f'<text x="{start - 6}" y="{y(value) + 4}" text-anchor="end">{value:.0%}')
        parts.append("</text>")
    for value in ticks(x.low, x.high):
        parts.append(f'<text x="{x(value)}" y="314" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{(start + end) / 2}" y="333" text-anchor="middle">{unit}</text>')
    parts.append(f'<path d="{_frontier(points, x, y)}" fill="none" stroke="#bbb"/>')
    for method, group in groups.items():
        for cost, top1, name in group:
            said = f"{name}: {top1:.1%}, {cost:.3g}"
            parts.append(_mark(x(cost), y(top1), methods.index(method), said))
    return parts


def _frontier(points: list[Point], x: Scale, y: Scale) -> str:
    """The line through the points that no cheaper one beats."""
    best = -1.0
    path: list[str] = []
    for cost, top1, _ in sorted(points, key=lambda p: (p[0], -p[1])):
        if top1 > best:
            path.append(f"{x(cost)} {y(top1)}")
            best = top1
    return "M" + "L".join(path)


def _mark(x: float, y: float, number: int, title: str) -> str:
    """A circle, then a square, then a diamond in each colour."""
    colour = COLOURS[number % len(COLOURS)]
    radius = 4.5 if number < len(COLOURS) else 0.5
    turn = f' transform="rotate(45 {x} {y})"' if number >= 2 * len(COLOURS) else ""
    return (
        f'<rect x="{x - 4.5}" y="{y - 4.5}" width="9" height="9" rx="{radius}" fill="{colour}"'
        f"{turn}><title>{title}</title></rect>"
    )
