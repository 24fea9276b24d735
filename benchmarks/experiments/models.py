"""Which models come in, and what can be done with them: parity with their own libraries.

    python -m benchmarks.experiments.models                every family and target
    python -m benchmarks.experiments.models --minutes 15 --targets onnxruntime open_clip
    python -m benchmarks.experiments.models --keep         only what the committed results lack
    python -m benchmarks.experiments.models --quick        three families, two targets

Small random models of every family are opened through the same door as anybody's checkpoint,
compared with the module of their own library, distilled for two steps, cut, and exported to every
target. Full named architectures with random weights are compared too. Each arm runs in a process of
its own and is kept in runs/models, so a stopped experiment continues, and one with further targets
adds them; `--keep` takes arms that are not there from the committed results. Arms that failed, or
that `--minutes` left no time to begin, are named as missing. The matrix in docs/models.md is drawn
from the result by `python -m benchmarks.matrix`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.experiments import _forked, model_arms, model_families
from compress import plugin
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
    """Name of an arm -> the function that computes its row, but for exports."""
    families = QUICK_FAMILIES if quick else model_families.FAMILIES
    found: dict[str, Callable[[Path], dict[str, Any]]] = {
        f"small: {family}": lambda folder, family=family: model_arms.small(  # type: ignore[misc]
            family, folder
        )
        for family in families
    }
    found = {"memory: ViT-B-16": model_arms.memory} | found
    if not quick:
        found |= {f"full: {name}": check for name, check in model_arms.FULL.items()}
    return found


def run_arm(name: str, place: Path, quick: bool, targets: Sequence[str]) -> None:
    """Compute in this process what an arm lacks, and keep it as soon as it is there."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    kept = place.with_suffix(".json")
    if not kept.exists():
        write_json(kept, {"arm": name, **arms(quick)[name](place)})
    row = json.loads(kept.read_text())
    if _lacking(row, targets):
        model_arms.add_exports(row, place, targets, lambda: write_json(kept, row))


def place_of(name: str, folder: Path) -> Path:
    """Where an arm works; its row is kept beside it."""
    return folder / "".join(letter if letter.isalnum() else "-" for letter in name)


def take_committed(folder: Path, results: Path) -> None:
    """Keep the rows of a results file in `folder`, where it has none of that arm."""
    for row in json.loads(results.read_text())["rows"]:
        kept = place_of(row["arm"], folder).with_suffix(".json")
        if not kept.exists():
            write_json(kept, row)


def run_arms(
    folder: Path, quick: bool, targets: Sequence[str], minutes: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the arms that are done, from their files if they are there; missing arms and why."""
    end = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    for name in arms(quick):
        place = place_of(name, folder)
        why = f"no time left of {minutes:g} minutes"
        while time.monotonic() < end and _unfinished(place.with_suffix(".json"), targets):
            failed = _forked.call(run_arm, (name, place, quick, targets), place.with_suffix(".log"))
            if failed and not _blame(place.with_suffix(".json"), targets, failed):
                why = failed
                break
        if place.with_suffix(".json").exists():
            rows.append(json.loads(place.with_suffix(".json").read_text()))
        else:
            missing.append(f"{name}: {why}")
        print(f"{name}: {'done' if place.with_suffix('.json').exists() else why}", flush=True)
    return rows, missing


def _unfinished(kept: Path, targets: Sequence[str]) -> bool:
    return not kept.exists() or bool(_lacking(json.loads(kept.read_text()), targets))


def _lacking(row: dict[str, Any], targets: Sequence[str]) -> list[str]:
    """Targets that a small model was not exported to yet."""
    return [target for target in targets if target not in row.get("exports", targets)]


def _blame(kept: Path, targets: Sequence[str], failed: str) -> bool:
    """Note a crash at the export that it came from; False where it came from none."""
    row = json.loads(kept.read_text()) if kept.exists() else {}
    lacking = _lacking(row, targets)
    if not lacking:
        return False
    row["exports"][lacking[0]] = f"its converter crashed ({failed})"
    write_json(kept, row)
    return True


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
    every = plugin.names(plugin.EXPORTERS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"few arms; writes into {QUICK.name}")
    parser.add_argument("--targets", nargs="+", choices=every, help="instead of every target")
    parser.add_argument("--minutes", type=float, help="begin no arm after that")
    parser.add_argument("--keep", action="store_true", help="rows of the committed results stand")
    given = parser.parse_args()
    targets = given.targets or (QUICK_TARGETS if given.quick else every)
    folder = QUICK if given.quick else RUNS
    folder.mkdir(parents=True, exist_ok=True)
    if given.keep:
        take_committed(folder, RESULTS)
    rows, missing = run_arms(folder, given.quick, targets, given.minutes or float("inf"))
    command = ["python -m benchmarks.experiments.models"]
    command += ["--quick"] if given.quick else []
    command += ["--targets", *given.targets] if given.targets else []
    command += ["--keep"] if given.keep else []
    command += [f"--minutes {given.minutes:g}"] if given.minutes else []
    result: dict[str, Any] = {
        "command": " ".join(command),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "seeds": [SEED],
        "rows": rows,
        "missing": missing,
        "claims": claims(rows),
    }
    write_json(folder / "models.json" if given.quick else RESULTS, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.3g} (goal {claim['goal']:.3g}) {verdict}")


if __name__ == "__main__":
    main()
