"""Which models come in, and what can be done with them: parity with their own libraries.

    python -m benchmarks.experiments.models            about 15 minutes on two cores
    python -m benchmarks.experiments.models --quick    three families, two targets; a few minutes

Small random models of every family are opened through the same door as anybody's checkpoint,
compared with the module of their own library, distilled for two steps, cut, and exported to every
target. Full named architectures with random weights are compared too. Each arm runs in a process of
its own and is kept in runs/models, so a stopped experiment continues. The matrix in docs/models.md
is drawn from the result by `python -m benchmarks.matrix`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.experiments import model_arms, model_families
from compress.atomic import write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/models.json"
RUNS, QUICK = ROOT / "runs/models", ROOT / "runs/models-quick"
SEED = 0
QUICK_FAMILIES = (model_families.FAMILIES[0], "SigLIP, SigLIP2", "ResNet")
QUICK_TARGETS = ("onnxruntime", "open_clip")
LIMIT = 1e-4
"""Largest difference of unit embeddings in float32 that counts as the same model."""


def arms(quick: bool) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Name of an arm -> the function that computes its row."""
    targets = QUICK_TARGETS if quick else None
    families = QUICK_FAMILIES if quick else model_families.FAMILIES
    found: dict[str, Callable[[Path], dict[str, Any]]] = {
        f"small: {family}": lambda folder, family=family: model_arms.small(  # type: ignore[misc]
            family, folder, targets
        )
        for family in families
    }
    if not quick:
        found |= {f"full: {name}": check for name, check in model_arms.FULL.items()}
    return found | {"memory: ViT-B-16": model_arms.memory}


def run_arm(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """The row of an arm, from its file if it is there."""
    place = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    kept = place.with_suffix(".json")
    if not kept.exists():
        command = [sys.executable, "-m", "benchmarks.experiments.models", "--arm", name]
        command += ["--quick"] if quick else []
        done = subprocess.run([*command, str(place)], cwd=ROOT)
        if done.returncode:
            sys.exit(f"{name} failed")
    row: dict[str, Any] = json.loads(kept.read_text())
    return row


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the families promise, drawn from the rows alone."""
    found = [
        _worst(rows, "image_difference", "image embeddings, largest difference to upstream", LIMIT),
        _worst(rows, "text_difference", "text embeddings, largest difference to upstream", LIMIT),
        _worst(rows, "pixel_difference", "pixels of non-square pictures, largest difference", 1e-6),
        _worst(rows, "num_wrong_ids", "token ids that differ on the golden texts", 0),
        _worst(rows, "peak_over_weights", "peak memory of loading ViT-B/16 over its weights", 1.3),
        _worst(rows, "reopened_difference", "exported folders opened again, difference", LIMIT),
    ]
    return [claim for claim in found if claim["rows"]]


def _worst(rows: list[dict[str, Any]], key: str, name: str, goal: float) -> dict[str, Any]:
    which = [index for index, row in enumerate(rows) if row.get(key) is not None]
    value = max((rows[index][key] for index in which), default=0.0)
    return {
        "name": name,
        "value": value,
        "goal": goal,
        "unit": "ratio" if "over" in key else "absolute",
        "better": "lower",
        "holds": bool(value <= goal),
        "rows": which,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"few arms; writes into {QUICK.name}")
    parser.add_argument("--arm", nargs=2, metavar=("NAME", "PLACE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    if given.arm:
        name, place = given.arm[0], Path(given.arm[1])
        row = {"arm": name, **arms(given.quick)[name](place)}
        write_json(place.with_suffix(".json"), row)
        return
    folder = QUICK if given.quick else RUNS
    folder.mkdir(parents=True, exist_ok=True)
    rows = [run_arm(name, folder, given.quick) for name in arms(given.quick)]
    result: dict[str, Any] = {
        "command": "python -m benchmarks.experiments.models" + (" --quick" if given.quick else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": [SEED],
        "rows": rows,
        "claims": claims(rows),
    }
    write_json(folder / "models.json" if given.quick else RESULTS, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.3g} (goal {claim['goal']:.3g}) {verdict}")


if __name__ == "__main__":
    main()
