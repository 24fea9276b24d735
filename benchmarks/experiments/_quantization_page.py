"""Tables of docs/quantization.md from the committed results.

python -m benchmarks.experiments._quantization_page        writes them between the page's marks
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments._quantization_arms import (
    EXECUTED,
    OUTLIERS,
    SIMULATED,
    SPOILT,
    runtimes,
)
from benchmarks.experiments._quantization_latency import MACS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quantization.md"
RESULTS = ROOT / "benchmarks/results/quantization.json"
VECTORS = ("text_to_image_r1", "bytes_per_vector")
TIMES = ("p50_ms", "min_ms")
START, END = "<!-- quantization: start -->", "<!-- quantization: end -->"


def tables(result: dict[str, Any]) -> str:
    """Executed arms, simulated ones, those not run, and all claims, also those falling short."""
    rows = [row for row in result["rows"] if "top1" in row]
    executed = [row for row in rows if row["executed"]]
    simulated = [row for row in rows if not row["executed"]]
    machine = result["machine"]
    parts = [
        "## Executed",
        _accuracy(executed, ("model", "arm", "runtime")),
        "## Simulated",
        _accuracy(simulated, ("model", "arm")),
        *_plain("## Smaller indexes", result["rows"], VECTORS),
        *_plain("## Time of the image tower", result["rows"], TIMES),
        "## Not measured yet",
        _missing(result["rows"]),
        "## What was asked for",
        _claims(result["claims"]),
        f"`{result['command']}`, {result['date']}, {machine['cores']} cores of {machine['cpu']}, "
        f"torch {result['versions']['torch']}, calibration seeds "
        f"{', '.join(map(str, result['seeds']))}: `benchmarks/results/quantization.json`.",
    ]
    return "\n\n".join(parts)


def _accuracy(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> str:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row.get(key, "")) for key in keys)].append(row)
    columns = ("top1", "text_to_image_r1", "image_cosine")
    lines = [f"| {' | '.join((*keys, *columns))} |", "|" + "---|" * (len(keys) + len(columns))]
    for name, group in groups.items():
        cells = [_spread([row[column] for row in group]) for column in columns]
        lines.append(f"| {' | '.join((*name, *cells))} |")
    return "\n".join(lines)


def _plain(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    """A title and a table of the rows that have these columns; nothing where there are none."""
    found = [row for row in rows if columns[-1] in row]
    if not found:
        return []
    lines = [f"| model | arm | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for row in found:
        cells = [str(row[c]) if isinstance(row[c], int) else f"{row[c]:.4g}" for c in columns]
        lines.append(f"| {' | '.join((row['model'], row['arm'], *cells))} |")
    return [title, "\n".join(lines)]


def _missing(every: list[dict[str, Any]]) -> str:
    """The arms of the experiment that no row is of, so that no claim speaks of them."""
    lines = []
    for model in ("teacher", "student"):
        own = [row for row in every if row["model"] == model]
        done = {(row["arm"], row.get("runtime")) for row in own}
        arms: list[tuple[str, str | None]] = []
        arms += [(arm, runtime) for arm in EXECUTED for runtime in runtimes(arm)]
        arms += [(arm, None) for arm in SIMULATED]
        arms += [(f"outliers in {place}, {arm}", None) for place in SPOILT for arm in OUTLIERS]
        names = [f"{a} ({r})" if r else a for a, r in arms if (a, r) not in done]
        names += [] if any("bytes_per_vector" in row for row in own) else ["smaller indexes"]
        if names:
            lines.append(f"- {model}: {', '.join(names) if own else 'every arm'}")
    timed = {row["model"] for row in every if "p50_ms" in row}
    lines += [f"- time: {name}" for name in MACS if name not in timed]
    return "\n".join(lines) or "Every arm has rows."


def _spread(values: list[float]) -> str:
    """Mean and sample deviation over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _claims(claims: list[dict[str, Any]]) -> str:
    lines = ["| figure | goal | measured | |", "|---|---:|---:|---|"]
    for claim in claims:
        sign = "at least" if claim["better"] == "higher" else "at most"
        verdict = "" if claim["holds"] else "falls short"
        lines.append(
            f"| {claim['name']} | {sign} {claim['goal']:g} | {claim['value']:.4f} | {verdict} |"
        )
    return "\n".join(lines)


def insert(page: str, result: dict[str, Any]) -> str:
    """The page with the tables between its marks."""
    before, _, rest = page.partition(START)
    _, mark, after = rest.partition(END)
    assert mark, f"{PAGE} lacks {START} ... {END}"
    return f"{before}{START}\n\n{tables(result)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(), json.loads(RESULTS.read_text())))
