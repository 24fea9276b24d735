"""docs/targets.md: what was exported where, made from benchmarks/results/targets.json alone."""

from typing import Any

from benchmarks.labels import TARGETS

HEAD = """\
# Targets

Each model exported to each target by the exporters' own contract: written, opened in its runtime,
compared with the torch model on generated pictures and texts, its goldens replayed. A figure is the
worst cosine to the torch model over all of them; a word is explained below the table. Models of
open_clip have random weights here: they show that a shape converts. A case that was not run counts
against the claims; of ViT-B/16, which is there for the time and memory of an export, one precision
a target is asked for. The command below is that of the last call: cases of earlier, stopped calls
are kept.
"""
WORDS = {
    "unavailable": "not here",
    "refused": "refused",
    "crashed": "crashed",
    "no source": "no model",
    "not run": "not run",
}


def page(result: dict[str, Any]) -> str:
    """The whole page: claims, one table per tower, reasons, where the figures are from."""
    rows = result["rows"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    parts = [HEAD, *_claims(result["claims"])]
    reasons: dict[str, int] = {}
    for tower in ("image", "text"):
        parts += [f"\n## {tower.capitalize()} towers\n"]
        parts += ["| target | precision | " + " | ".join(sources) + " |"]
        parts += ["|---|---|" + "---:|" * len(sources)]
        cases = dict.fromkeys((row["target"], row["precision"]) for row in rows)
        for target, precision in cases:
            cells = [_cell(rows, source, target, precision, tower, reasons) for source in sources]
            name = TARGETS.get(target, target)
            parts.append(f"| {name} | {precision or ''} | " + " | ".join(cells) + " |")
    parts += _costs(rows, sources)
    if reasons:
        parts.append("\n## Reasons\n")
        parts += [f"{number}. {reason}" for reason, number in reasons.items()]
    machine, versions = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    parts.append(_places(rows))
    parts.append(
        f"\n`{result['command']}`, {result['date']}, {machine['cores']} cores of "
        f"{machine['cpu']}; {packages}: `benchmarks/results/targets.json`.\n"
    )
    return "\n".join(parts)


def _places(rows: list[dict[str, Any]]) -> str:
    """Which CPU the cases of each model were run on."""
    found: dict[str, list[str]] = {}
    for row in rows:
        cpu = row.get("cpu")
        if cpu and row["source"] not in found.setdefault(cpu, []):
            found[cpu].append(row["source"])
    told = [f"{', '.join(sources)} on {cpu}" for cpu, sources in found.items()]
    return f"\nMeasured: {'; '.join(told)}." if told else ""


def _costs(rows: list[dict[str, Any]], sources: list[str]) -> list[str]:
    """What the first precision of each target cost: time on the wall, of processors, memory."""
    head = ["\n## Time and memory of an export\n"]
    head += ["Seconds with the parity gate, of them processor time; megabytes added.\n"]
    head += ["| target | " + " | ".join(sources) + " |", "|---|" + "---:|" * len(sources)]
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row.get("seconds") is not None:
            first.setdefault((row["target"], row["source"]), row)
    lines = []
    for target in dict.fromkeys(target for target, _ in first):
        found = [first.get((target, source)) for source in sources]
        cells = " | ".join("" if row is None else _cost(row) for row in found)
        lines.append(f"| {TARGETS.get(target, target)} | {cells} |")
    return [*head, *lines] if lines else []


def _cost(row: dict[str, Any]) -> str:
    spent = row.get("processor_seconds")
    megabytes = row.get("peak_memory_bytes", 0) / 1e6
    return f"{row['seconds']:.0f} s{f' ({spent:.0f} s)' if spent else ''}, {megabytes:.0f} MB"


def _claims(claims: list[dict[str, Any]]) -> list[str]:
    lines = ["| figure | goal | measured | |", "|---|---:|---:|---|"]
    shows = {"fraction": "{:.0%}", "ratio": "{:.1f}x", "seconds": "{:.0f} s"}
    for claim in claims:
        show = shows[claim["unit"]].format
        sign = "at least" if claim["better"] == "higher" else "at most"
        verdict = "" if claim["holds"] else "falls short"
        lines.append(
            f"| {claim['name']} | {sign} {show(claim['goal'])} | {show(claim['value'])} | "
            f"{verdict} |"
        )
    return lines


def _cell(
    rows: list[dict[str, Any]],
    source: str,
    target: str,
    precision: str | None,
    tower: str,
    reasons: dict[str, int],
) -> str:
    key = (source, target, precision, tower)
    names = ("source", "target", "precision", "tower")
    row = next((r for r in rows if tuple(r[name] for name in names) == key), None)
    if row is None:
        return ""
    mark = ""
    if row["reason"]:
        # A gate names its tower and figures: the same words are one reason.
        mark = f" [{reasons.setdefault(row['reason'], len(reasons) + 1)}]"
    if not row["passed"]:
        return f"{WORDS[row['kind']]}{mark}"
    parts = (row.get("runtime") or {}).get("delegates")
    pieces = f", {parts} delegates" if parts else ""
    return f"{row['worst_cosine']:.5f}{pieces}{mark}"
