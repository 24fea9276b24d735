"""docs/scaling.svg: cost against size on two logarithmic axes, a panel for each curve.

The file follows the reader's light or dark theme by itself.
"""

import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from benchmarks.charts import Scale

NAMES = {
    "image_size": "image size, pixels a side",
    "batch": "batch, images",
    "width": "width of the tower",
    "threads": "threads",
    "index_size": "embeddings searched",
    "train_size": "training pairs",
}
PANEL, GAP, COLUMNS = (280.0, 210.0), 28.0, 3
LEFT, BOTTOM, TOP = 46.0, 44.0, 34.0
Rows = list[dict[str, Any]]


def panel(curve: str, rows: Rows, index: int) -> dict[str, Any] | None:
    """Positions of a curve's points, whiskers and fitted line; None with fewer than two points."""
    points = [row for row in rows if row["curve"] == curve and row.get("p50_ms")]
    fitted = next((r for r in rows if r["curve"] == curve and r.get("exponent") is not None), None)
    if len(points) < 2 or fitted is None:
        return None
    sizes = [float(row["size"]) for row in points]
    times = [value for row in points for value in (*row["p50_ms_ci95"], row["p50_ms"])]
    left = (index % COLUMNS) * (PANEL[0] + GAP)
    top = (index // COLUMNS) * (PANEL[1] + GAP)
    x = Scale(min(sizes) / 1.15, max(sizes) * 1.15, left + LEFT, left + PANEL[0], True)
    y = Scale(min(times) / 1.3, max(times) * 1.3, top + PANEL[1] - BOTTOM, top + TOP, True)
    middle = sum(math.log2(row["p50_ms"]) for row in points) / len(points)
    centre = sum(math.log2(size) for size in sizes) / len(sizes)
    line = [
        (s, 2.0 ** (middle + fitted["exponent"] * (math.log2(s) - centre))) for s in _ends(sizes)
    ]
    low, high = fitted["exponent_ci95"]
    return {
        "title": NAMES.get(curve, curve),
        "exponent": f"time ~ size^{fitted['exponent']:.2f} ({low:.2f} to {high:.2f})",
        "left": left,
        "top": top,
        "line": [(x(s), y(min(max(t, y.low), y.high))) for s, t in line],
        "points": [
            {
                "cx": x(float(row["size"])),
                "cy": y(row["p50_ms"]),
                "low": y(row["p50_ms_ci95"][0]),
                "high": y(row["p50_ms_ci95"][1]),
                "size": f"{row['size']:,}",
                "ms": f"{row['p50_ms']:.3g}",
            }
            for row in points
        ],
    }


def draw(rows: Rows) -> str:
    """The whole drawing."""
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    panels: list[dict[str, Any]] = []
    for curve in curves:
        found = panel(curve, rows, len(panels))
        panels += [found] if found else []
    lines = -(-len(panels) // COLUMNS)
    environment = Environment(
        loader=PackageLoader("benchmarks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("scaling.svg.j2").render(
        panels=panels,
        width=COLUMNS * PANEL[0] + (COLUMNS - 1) * GAP,
        height=lines * (PANEL[1] + GAP),
        panel={"width": PANEL[0], "height": PANEL[1], "left": LEFT, "bottom": BOTTOM, "top": TOP},
    )


def _ends(sizes: list[float]) -> tuple[float, float]:
    return min(sizes), max(sizes)
