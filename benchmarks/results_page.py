"""docs/results.md and docs/scaling.svg: every committed figure, from the results files alone.

python -m benchmarks.results_page        writes both
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import results_tables, scaling_plots
from compress import atomic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/results.md"
PLOT = ROOT / "docs/scaling.svg"
FORMATS = {
    "fraction": (100, 1, " %"),
    "ratio": (1, 2, "x"),
    "count": (1, 0, ""),
    "exponent": (1, 2, ""),
}
"""Unit -> factor, decimals, what stands behind."""
MORE_DECIMALS = 3
NEAR = 1e-3
"""How far a goal as shown may be from the goal, as a share of it."""
TABLES = {
    "latency": ("path", "tower", "repeat", "p50_ms", "min_ms", "tool", "p50_ms_other"),
    "gpu": (
        "part",
        "model",
        "tower",
        "target",
        "precision",
        "batch",
        "host",
        "p50_ms",
        "p50_ms_ci95",
        "worst_cosine",
        "worst_cosine_simulated",
        "reason",
        "train_seconds",
        "top1",
        "beside",
    ),
    "scaling": ("curve", "size", "p50_ms", "exponent", "exponent_ci95"),
}
"""Columns of the experiments whose rows are shown one by one."""


def page(results: dict[str, dict[str, Any]]) -> str:
    """The whole page, from the contents of the results files by name."""
    parts = [
        "# Results",
        "",
        "Written by `python -m benchmarks.results_page` from `benchmarks/results/`.",
    ]
    for name, result in sorted(results.items()):
        about = result["machine"]
        parts += ["", f"## {name.replace('_', ' ').capitalize()}", ""]
        parts += _claims(result.get("claims", []))
        parts += [f"![cost against size]({PLOT.name})", ""] * (name == "scaling")
        parts += _rows(result["rows"], TABLES[name]) if name in TABLES else []
        own = results_tables.BY_NAME.get(name)
        parts += own(result["rows"]) if own else []
        parts += [result["note"], ""] if "note" in result else []
        parts += [
            f"`{result['command']}`, {result['date']}, {about['cores']} cores of {about['cpu']}: "
            f"`benchmarks/results/{name}.json`."
        ]
    return "\n".join(parts) + "\n"


def _claims(claims: list[dict[str, Any]]) -> list[str]:
    if not claims:
        return []
    lines = ["| figure | goal | measured | |", "|---|---:|---:|---|"]
    for claim in claims:
        sign = "at least" if claim["better"] == "higher" else "at most"
        goal, value = _figures(claim["goal"], claim["value"], claim["unit"])
        verdict = "" if claim["holds"] else "falls short"
        lines.append(f"| {claim['name']} | {sign} {goal} | {value} | {verdict} |")
    return [*lines, ""]


def _figures(goal: float, value: float, unit: str) -> tuple[str, str]:
    """Both as text, with as many decimals as it takes to see the goal and which is larger."""
    if unit not in FORMATS:
        return f"{goal:.4g} {unit}", f"{value:.4g} {unit}"
    factor, first, behind = FORMATS[unit]
    for decimals in range(first, first + MORE_DECIMALS + 1):
        found = [f"{factor * number:.{decimals}f}{behind}" for number in (goal, value)]
        rounded = abs(round(factor * goal, decimals) - factor * goal)
        apart = found[0] != found[1] or goal == value
        if apart and rounded <= NEAR * abs(factor * goal):
            break
    return found[0], found[1]


def _rows(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    """The rows as a table; columns that no row has are left out."""
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    lines = ["| " + " | ".join(key.replace("_", " ") for key in shown) + " |"]
    lines.append("|" + "---|" * len(shown))
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in shown) + " |" for row in rows]
    return [*lines, ""]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_cell(part) for part in value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    atomic.write_text(PAGE, page(found))
    if "scaling" in found:
        atomic.write_text(PLOT, scaling_plots.draw(found["scaling"]["rows"]))
