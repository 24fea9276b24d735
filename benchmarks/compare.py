"""Two runs side by side, and conditions under which the second one must not be merged.

A condition is `FIGURE > BOUND` or `FIGURE < BOUND`, true where the run must be refused:

    p50>+5%       slower than before by more than 5 percent
    top1<-0.3     more than 0.3 percentage points lower than before
    size>+20kB    larger by more than 20 kB
    p90>12ms      above 12 milliseconds, whatever it was before: no sign, no comparison
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from compress.errors import PocketclipError
from compress.plugin import did_you_mean

Row = dict[str, Any]

NAMED_BY = ("artifact", "target", "precision", "tower", "threads", "host", "scope")
"""What makes a row of one run the counterpart of a row of the other."""

SHORT = {
    "p50": "p50_ms",
    "p90": "p90_ms",
    "p99": "p99_ms",
    "min": "min_ms",
    "load": "load_ms",
    "first": "first_ms",
    "size": "size_bytes",
    "memory": "peak_memory_bytes",
    "energy": "energy_mj",
    "params": "num_params",
    "parity": "parity_worst_cosine",
}
FRACTIONS = re.compile(r"top\d|(image_to_text|text_to_image)_r\d+|teacher_(top1|overlap).*")
"""Figures whose bounds are percentage points."""
SHOWN = ("top1", "image_to_text_r1", "size_bytes", "p50_ms", "p90_ms", "peak_memory_bytes")
"""Figures that are listed whether a condition names them or not."""
UNITS = {"": 1.0, "ms": 1.0, "mj": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "pt": 1.0}
CONDITION = re.compile(
    r"\s*(?P<figure>\w+)\s*(?P<sign>[<>])\s*(?P<bound>[+-]?\d+(?:\.\d+)?)\s*(?P<unit>%|[a-zA-Z]*)\s*"
)


@dataclass(frozen=True)
class Condition:
    """When to refuse, as read from one `--fail-if`."""

    text: str
    key: str
    """Column of summary.json."""
    above: bool
    """True for >."""
    bound: float
    """In the unit of the column; a share of 1 where `relative`."""
    change: bool
    """Bounds the change from the first run to the second, rather than the second's value."""
    relative: bool

    def value(self, before: float | None, after: float) -> float | None:
        """What is compared with the bound; None where there is nothing before to compare with."""
        if not self.change:
            return after
        if before is None or (self.relative and before == 0):
            return None
        return after / before - 1 if self.relative else after - before

    def refuses(self, value: float) -> bool:
        return value > self.bound if self.above else value < self.bound


@dataclass(frozen=True)
class Line:
    """One figure of one row in both runs."""

    row: str
    key: str
    before: float | None
    after: float | None
    interval: tuple[float, float] | None
    """95 % interval of the change (of the ratio less 1 for times and sizes); None if unknown."""


def read(path: Path) -> dict[str, Any]:
    """summary.json of a run folder, or the file itself. Raises PocketclipError."""
    path = path / "summary.json" if path.is_dir() else path
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PocketclipError(f"{path}: no such file; run the recipe first") from None
    except json.JSONDecodeError as error:
        raise PocketclipError(f"{path}: not JSON ({error}); run the bench again") from None
    if not isinstance(summary, dict) or "rows" not in summary:
        raise PocketclipError(f"{path}: no rows; a run folder or its summary.json is needed")
    return summary


def split_arguments(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Runs and conditions of `A B --fail-if X Y`, whose words arrive in one list."""
    conditions = [word for word in words if CONDITION.fullmatch(word) and not Path(word).exists()]
    return [Path(word) for word in words if word not in conditions], conditions


def parse(text: str, columns: Iterable[str]) -> Condition:
    """One condition. Raises PocketclipError for a figure that no row has, or another form."""
    found = CONDITION.fullmatch(text)
    if found is None:
        raise PocketclipError(
            f"--fail-if {text!r}: write FIGURE>BOUND or FIGURE<BOUND, such as p50>+5% or top1<-0.3"
        )
    key, known = SHORT.get(found["figure"], found["figure"]), sorted(columns)
    if key not in known:
        raise PocketclipError(f"--fail-if {text!r}: no such figure{did_you_mean(key, known)}")
    unit, change = found["unit"].lower(), found["bound"][0] in "+-"
    if unit not in (*UNITS, "%"):
        raise PocketclipError(
            f"--fail-if {text!r}: unknown unit{did_you_mean(unit, [*UNITS, '%'])}"
        )
    points = _is_fraction(key) and (change or unit in ("%", "pt"))
    # "top1<-0.3%" is written by people who mean points: a relative bound of a fraction helps none.
    relative = unit == "%" and change and not points
    scale = 0.01 if points or unit == "%" else UNITS[unit]
    return Condition(
        text.strip(), key, found["sign"] == ">", float(found["bound"]) * scale, change, relative
    )


def lines(
    before: dict[str, Any], after: dict[str, Any], conditions: Sequence[Condition]
) -> list[Line]:
    """Every figure that is shown or bounded, for each row of the second run that was measured."""
    known = {_name(row): row for row in before["rows"]}
    keys = dict.fromkeys((*SHOWN, *(condition.key for condition in conditions)))
    found = []
    for row in after["rows"]:
        old = known.get(_name(row), {})
        found += [
            Line(_name(row), key, old.get(key), row.get(key), _interval(key, old, row))
            for key in keys
            if row.get(key) is not None or old.get(key) is not None
        ]
    return found


def missing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Rows that only the first run has."""
    there = {_name(row) for row in after["rows"]}
    return [_name(row) for row in before["rows"] if _name(row) not in there]


def failures(found: Sequence[Line], conditions: Sequence[Condition]) -> list[str]:
    """One sentence for each condition and row that refuses the second run."""
    said = []
    for condition in conditions:
        bounded = [line for line in found if line.key == condition.key]
        judged = [line for line in bounded if line.after is not None]
        said += [
            f"{line.row}: {line.key} is no longer measured"
            for line in bounded
            if line.after is None
        ]
        values = [(line, condition.value(line.before, line.after or 0.0)) for line in judged]
        if not any(value is not None for _, value in values):
            said.append(f"{condition.text}: no row of both runs has {condition.key}")
        said += [
            f"{line.row}: {_sentence(condition, line, value)}"
            for line, value in values
            if value is not None and condition.refuses(value)
        ]
    return said


def render(found: Sequence[Line]) -> Table:
    """The figures that are in either run as a table for a terminal."""
    table = Table(
        "artifact", "figure", "A", "B", "change", "95 % interval", box=None, pad_edge=False
    )
    row = None
    for line in found:
        name, row = ("" if line.row == row else line.row), line.row
        values = [_value(line.key, value) for value in (line.before, line.after)]
        interval = " to ".join(_shown(bound, line.key) for bound in line.interval or ())
        table.add_row(name, line.key, *values, _change(line), interval)
    return table


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else differs between the runs, so that a change may not be the model's."""
    found = []
    for part in ("machine", "versions"):
        old, new = before.get(part, {}), after.get(part, {})
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key) and not isinstance(new.get(key, old.get(key)), dict):
                found.append(f"{key}: {old.get(key)} -> {new.get(key)}")
    return found


def _sentence(condition: Condition, line: Line, value: float) -> str:
    shown = (
        f"{100 * value:+.1f} %"
        if condition.relative
        else f"{value:{'+' if condition.change else ''}.4g}"
    )
    sure = ""
    if condition.change and line.interval and condition.relative == _is_ratio(line.key):
        low, high = line.interval
        if low <= condition.bound <= high:
            sure = (
                f", not certain: 95 % interval {_shown(low, line.key)} to {_shown(high, line.key)}"
            )
    return f"{line.key} {shown} ({condition.text}{sure})"


def _shown(value: float, key: str) -> str:
    return f"{100 * value:+.1f} {'%' if _is_ratio(key) else 'points'}"


def _change(line: Line) -> str:
    if not line.before or line.after is None:
        return ""
    if _is_ratio(line.key):
        return _shown(line.after / line.before - 1, line.key)
    change = line.after - line.before
    return _shown(change, line.key) if _is_fraction(line.key) else f"{change:+.4g}"


def _value(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if _is_fraction(key):
        return f"{100 * value:.1f} %"
    return f"{value / 1e6:.3f} MB" if key.endswith("_bytes") else f"{value:.4g}"


def _is_fraction(key: str) -> bool:
    return bool(FRACTIONS.fullmatch(key))


def _is_ratio(key: str) -> bool:
    """Times and sizes are compared as ratios, accuracies as differences."""
    return key.endswith(("_ms", "_bytes", "_mj"))


def _interval(key: str, before: Row, after: Row) -> tuple[float, float] | None:
    """Of the change, from both intervals (our formulation: independent errors add in quadrature).

    The two runs' errors are taken as independent, which makes it wider than it is where both runs
    asked the same questions.
    """
    old, new = before.get(key), after.get(key)
    bounds = [before.get(f"{key}_ci95"), after.get(f"{key}_ci95")]
    if old is None or new is None:
        return None
    pairs = [(float(bound[0]), float(bound[1])) for bound in bounds if bound is not None]
    if len(pairs) < 2:
        return None
    if _is_ratio(key):
        middle, half = math.log(new / old), math.hypot(*(math.log(b / a) / 2 for a, b in pairs))
        return math.exp(middle - half) - 1, math.exp(middle + half) - 1
    half = math.hypot(*((high - low) / 2 for low, high in pairs))
    return new - old - half, new - old + half


def _name(row: Row) -> str:
    """`student onnxruntime int8 image`; threads, host and scope where they are unusual."""
    parts = [str(row[key]) for key in NAMED_BY[:4] if row.get(key)]
    if (row.get("threads") or 1) > 1:
        parts.append(f"{row['threads']} threads")
    if row.get("host") not in (None, "local"):
        parts.append(f"on {row['host']}")
    if row.get("scope") not in (None, "model"):
        parts.append(f"with {row['scope']}")
    return " ".join(parts)
