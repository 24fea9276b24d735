"""Markdown tables from the committed results, so that no page states a figure of its own.

python -m benchmarks.tables        writes the tables between the marks in README.md
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
START, END = "<!-- first_light: start -->", "<!-- first_light: end -->"
FORMATS = {"fraction": "{:.1%}", "ratio": "{:.1f}x"}


def first_light() -> str:
    """The claims of first_light.json as a table, those that fall short included."""
    result = json.loads((RESULTS / "first_light.json").read_text())
    machine = result["machine"]
    lines = ["| figure | goal | measured | |", "|---|---:|---:|---|"]
    lines += [_row(claim) for claim in result["claims"]]
    lines += [
        "",
        f"`{result['command']}`, {result['date']}, {machine['cores']} cores of {machine['cpu']}, "
        f"torch {result['versions']['torch']}, seeds {', '.join(map(str, result['seeds']))}: "
        "`benchmarks/results/first_light.json`.",
    ]
    return "\n".join(lines)


def insert(page: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(START)
    _, mark, after = rest.partition(END)
    assert mark, f"{README} lacks {START} ... {END}"
    return f"{before}{START}\n\n{first_light()}\n\n{END}{after}"


def _row(claim: dict[str, Any]) -> str:
    show = FORMATS[claim["unit"]].format
    sign = "at least" if claim["better"] == "higher" else "at most"
    verdict = "" if claim["holds"] else "falls short"
    return (
        f"| {claim['name']} | {sign} {show(claim['goal'])} | {show(claim['value'])} | {verdict} |"
    )


if __name__ == "__main__":
    README.write_text(insert(README.read_text()))
