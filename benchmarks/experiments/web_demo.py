"""How long the web bundle's page takes for a text query, in headless Chromium.

    python -m benchmarks.experiments.web_demo          about two minutes on two cores

Exports the embedded teacher with its page over the embedded emoji, opens the page, and types
captions of the held-out style, each once; the figure is the one that the page shows.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from compress.atomic import write_json
from compress.export_command import export
from export import _npm
from export._chromium import Chromium
from export._serve import Server

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "recipes" / "emoji" / "teacher"
RESULTS = ROOT / "benchmarks" / "results" / "web_demo.json"
QUICK = ROOT / "build" / "web_demo.json"
NUM_QUERIES, NUM_QUICK = 200, 10
GOAL_MS, GOAL_PICTURES = 50, 1000
WARM_UP = 5
SEED = 0


def measure(bundle: Path, num_queries: int) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per query after warm-up, and whatever the console complained of."""
    gallery = json.loads((bundle / "demo/gallery.json").read_text(encoding="utf-8"))
    names = [picture["name"] for picture in gallery["pictures"]]
    texts = np.random.default_rng(SEED).choice(names, num_queries + WARM_UP, replace=False)
    with Server({"": bundle}) as server, Chromium() as chromium:
        chromium.open(server.url)
        chromium.evaluate("ready")
        threads = chromium.evaluate("crossOriginIsolated ? navigator.hardwareConcurrency : 1")
        rows = [_row(chromium, str(text), len(names), threads) for text in texts]
        return rows[WARM_UP:], list(chromium.problems)


def _row(chromium: Chromium, text: str, pictures: int, threads: int) -> dict[str, Any]:
    """Type a text as a user would, without waiting for the pause after typing."""
    chromium.evaluate(f"document.querySelector('#query').value = {json.dumps(text)}")
    shown = chromium.evaluate("pocketclip.searchText().then(() => pocketclip.state.lastMs)")
    first = chromium.evaluate("document.querySelector('#results b').textContent")
    return {
        "text": text,
        "ms": round(shown, 3),
        "first_result": first,
        "pictures": pictures,
        "threads": min(4, threads),
    }


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of the page, met or not."""
    timed = [index for index, row in enumerate(rows) if "ms" in row]
    [page] = [index for index, row in enumerate(rows) if "console_problems" in row]
    times = [rows[index]["ms"] for index in timed]
    median, p90 = (round(float(np.percentile(times, q)), 3) for q in (50, 90))
    entries = [
        ("text query in the page, median", median, GOAL_MS, "ms", "lower", timed),
        ("text query in the page, 90th percentile", p90, GOAL_MS, "ms", "lower", timed),
        ("pictures searched", rows[timed[0]]["pictures"], GOAL_PICTURES, "", "higher", timed[:1]),
        ("console problems", rows[page]["console_problems"], 0, "", "lower", [page]),
    ]
    return [
        {
            "name": name,
            "value": value,
            "goal": goal,
            "unit": unit,
            "better": better,
            "holds": value >= goal if better == "higher" else value <= goal,
            "rows": places,
        }
        for name, value, goal, unit, better, places in entries
    ]


def main() -> None:
    """Export, measure, write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{NUM_QUICK} queries, to {QUICK}")
    quick = parser.parse_args().quick
    bundle = export(str(TEACHER), "web", [], ROOT / "build" / "web_demo")
    before = machine.load_average()
    rows, problems = measure(bundle, NUM_QUICK if quick else NUM_QUERIES)
    about = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    rows.append({"console_problems": len(problems), "parity": about["parity"]})
    result = {
        "command": "python -m benchmarks.experiments.web_demo" + (" --quick" if quick else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe() | {"load_before": before},
        "versions": machine.versions() | {name: v for name, (v, _) in _npm.PACKAGES.items()},
        "seeds": [SEED],
        "rows": rows,
        "claims": claims(rows),
    }
    target = QUICK if quick else RESULTS
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, result)
    print(target)


if __name__ == "__main__":
    main()
