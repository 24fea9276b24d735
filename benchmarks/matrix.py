"""The matrix of models in docs/models.md, drawn from the committed results.

python -m benchmarks.matrix        writes the page
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/models.md"
RESULTS = ROOT / "benchmarks/results/models.json"

HEAD = """\
# Models that come in

Drawn from `benchmarks/results/models.json` by `python -m benchmarks.matrix`; `{command}`, {date},
{cores} cores of {cpu}, torch {torch}. Small random models of each family are opened like anybody's
checkpoint and compared with their own library; a number in a cell is the reason below the tables.
Rows of earlier runs are kept (`--keep`).

"loads" is the largest difference of unit embeddings to the library's own module, image and text;
"distils" two steps towards itself; "prunes" the inherit stage with a layer less; "quantizes" ONNX
Runtime's int8.
"""


def page(result: dict[str, Any]) -> str:
    """The whole page as Markdown."""
    reasons: list[str] = []
    small = [row for row in result["rows"] if row["config"] == "small"]
    parts = [_head(result), _table(small, reasons), _targets(small, reasons), _full(result["rows"])]
    parts.append(_claims(result["claims"]))
    parts.append(_missing(result["missing"]))
    parts.append("## Reasons\n\n" + "\n".join(f"{n}. {r}" for n, r in enumerate(reasons, 1)))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _head(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return HEAD.format(
        command=result["command"],
        date=result["date"],
        cores=machine["cores"],
        cpu=machine["cpu"],
        torch=result["versions"]["torch"],
    )


def _table(rows: list[dict[str, Any]], reasons: list[str]) -> str:
    lines = [
        "| family | loads | saves | distils | prunes | quantizes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_cell(row[key], reasons) for key in ("saves", "distils", "prunes", "quantizes")]
        lines.append(f"| {row['family']} | {_parity(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _targets(rows: list[dict[str, Any]], reasons: list[str]) -> str:
    targets = sorted({target for row in rows for target in row["exports"]})
    lines = [
        "## Exports",
        "",
        f"| family | {' | '.join(targets)} |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for row in rows:
        cells = [_cell(row["exports"].get(target, "not tried"), reasons) for target in targets]
        lines.append(f"| {row['family']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _full(rows: list[dict[str, Any]]) -> str:
    lines = ["## Named architectures in full", "", "| model | largest difference, image, text |"]
    lines.append("|---|---|")
    lines += [f"| {r['name']} | {_parity(r)} |" for r in rows if r["config"] == "full"]
    return "\n".join(lines)


def _missing(names: list[str]) -> str:
    return "## Arms that were not run\n\n" + ("\n".join(f"- {name}" for name in names) or "none")


def _claims(claims: list[dict[str, Any]]) -> str:
    lines = ["## Claims", "", "| figure | goal | measured | |", "|---|---:|---:|---|"]
    for claim in claims:
        verdict = "" if claim["holds"] else "falls short"
        goal, value = f"at most {claim['goal']:.3g}", f"{claim['value']:.3g}"
        lines.append(f"| {claim['name']} | {goal} | {value} | {verdict} |")
    return "\n".join(lines)


def _parity(row: dict[str, Any]) -> str:
    return f"{row['image_difference']:.0e}, {row['text_difference']:.0e}"


def _cell(outcome: str, reasons: list[str]) -> str:
    """yes, or the number of the reason."""
    if outcome in ("yes", "not tried"):
        return outcome
    if outcome not in reasons:
        reasons.append(outcome)
    return f"no ({reasons.index(outcome) + 1})"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
