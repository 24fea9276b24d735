"""What doing less costs and gains: tokens, exact passes, a smaller vocabulary.

    python -m benchmarks.experiments.reduction            about two hours on one quiet core
    python -m benchmarks.experiments.reduction --quick    a few minutes; shows only that it works

Parts: accuracy of every method on two held-out tasks; recovery by training; latency of towers with
random weights; what a token costs a layer; parity in every runtime; exactness and bytes. Each case
is kept in runs/reduction once measured, so that a stopped experiment continues. `--parts`,
`--models` and `--seeds` run some of them; rows of the others stay as they are in the results file.
"""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.experiments import _reduction_accuracy as accuracy
from benchmarks.experiments import _reduction_exact as exactness
from benchmarks.experiments import _reduction_latency as latency
from benchmarks.experiments import _reduction_parity as parity
from benchmarks.experiments import _reduction_recovery as recovery
from benchmarks.experiments import _reduction_tokens as token_costs
from benchmarks.experiments._reduction_claims import claims as claims
from compress.atomic import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/reduction.json"
RUNS, QUICK = ROOT / "runs/reduction", ROOT / "runs/reduction-quick"
PARTS = ("accuracy", "recovery", "latency", "tokens", "parity", "exact")
MODELS = (latency.TEACHER, *latency.NAMES)

Rows = list[dict[str, Any]]


def measure(part: str, folder: Path, given: argparse.Namespace, known: Rows) -> Rows:
    """The rows of one part, of the models, arms and seeds that were asked for."""
    tasks = accuracy.Tasks(64 if given.quick else None)
    if part == "accuracy":
        own = [row for row in known if row["part"] == part]
        kept = folder / "accuracy" / tasks.digest
        return accuracy.measure(kept, tasks, given.quick, given.arms, own)
    if part == "latency":
        rows: Rows = []
        if latency.TEACHER in given.models:
            arms = accuracy.clips(tasks.teacher, given.quick)
            rows = latency.of_arms(folder / "arms" / tasks.digest, tasks.teacher, arms)
        names = [name for name in given.models if name != latency.TEACHER]
        kept = folder / "latency"
        return rows + latency.measure(kept, names, tasks.teacher.tokenizer, given.quick)
    if part == "tokens":
        return token_costs.measure(folder / "tokens")
    if part == "parity":
        return parity.measure(folder / "parity", given.quick)
    if part == "exact":
        return exactness.measure(tasks.teacher, tasks.data)
    return recovery.measure(folder / "recovery", tasks, given.trained, given.seeds)


def replaced(row: dict[str, Any], given: argparse.Namespace) -> bool:
    """Whether a committed row has just been measured again."""
    if row["part"] not in given.parts:
        return False
    if row["part"] == "latency":
        return row["model"] in given.models
    if row["part"] == "recovery":
        return row["arm"] in given.trained and row["seed"] in given.seeds
    return True


def committed(path: Path) -> Rows:
    """The rows that stand in a results file."""
    found: Rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"writes into {QUICK.name}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--arms", nargs="+", help="of accuracy, by their names in the page")
    trained = list(recovery.ARMS)
    parser.add_argument("--trained", nargs="+", choices=trained, default=trained)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = QUICK if given.quick else RUNS
    path = folder / "reduction.json" if given.quick else RESULTS
    found = {part: measure(part, folder, given, committed(path)) for part in given.parts}
    # Read again: another part may have been measured meanwhile.
    rows = [row for row in committed(path) if not replaced(row, given)]
    rows += [row for part in given.parts for row in found[part]]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.reduction", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": sorted({row["seed"] for row in rows if "seed" in row} | {0}),
        "rows": rows,
        "claims": claims(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.4g} (goal {claim['goal']:g}) {verdict}")


if __name__ == "__main__":
    main()
