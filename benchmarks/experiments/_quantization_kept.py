"""Finished arms of the quantization experiment: what is measured once is not measured again.

An arm's rows are kept in a file of their own; where it is not there, as in a fresh clone, they are
taken from the committed results, if these are of the same weights.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from compress.atomic import write_json

Rows = list[dict[str, Any]]


def once(path: Path, make: Callable[[], Rows]) -> None:
    """Measure an arm, unless its rows are kept in this file."""
    if path.exists():
        return
    rows = make()
    _keep(path, rows)
    print(path.stem, *(_line(row) for row in rows), sep="\n  ", flush=True)


def take_over(
    results: Path, files: Mapping[str, tuple[str | None, Path]], now: Mapping[str, Any]
) -> None:
    """Keep the arms of a results file that are not kept yet and would come out the same.

    files: arm -> its model (None where something is timed) and where its rows are kept. now:
    `quantize_version`, `weights` (model -> sha256) and `machine`, as in the results. Accuracies are
    of the weights and of the stage's version; times are of the machine too.
    """
    if not results.exists():
        return
    found = json.loads(results.read_text())
    if found["quantize_version"] != now["quantize_version"]:
        return
    current = [row for row in found["rows"] if "quantize_version" not in row]
    for name, (model, path) in files.items():
        own = [_without_job(row) for row in current if row["job"] == name]
        if own and not path.exists() and _alike(found, now, model):
            _keep(path, own)


def carried(
    results: Path, now: Mapping[str, Any], measured: Collection[str]
) -> tuple[Rows, dict[str, str]]:
    """Rows of the results that nothing here replaces, and the sha256 of the models not here.

    These are rows of models whose weights aren't here, and rows of an older version of the stage
    (their own `quantize_version` says so) whose arm is not `measured` yet. Rows of a model whose
    weights are others now go.
    """
    if not results.exists():
        return [], {}
    found = json.loads(results.read_text())
    rows, version = found["rows"], found["quantize_version"]
    if version != now["quantize_version"]:
        rows = [{"quantize_version": version, **row} for row in rows]
    away = {model: sha for model, sha in found["weights"].items() if model not in now["weights"]}
    told = found["weights"]
    changed = {model for model, sha in now["weights"].items() if told.get(model, sha) != sha}
    rows = [row for row in rows if row["model"] not in changed]
    older = [row for row in rows if "quantize_version" in row]
    stay = [row for row in rows if row["model"] in away]
    return stay + [row for row in older if row["job"] not in measured and row not in stay], away


def rows_of(name: str, path: Path) -> Rows:
    """An arm's kept rows, each with the arm's name as its `job`; none where it was not run."""
    if not path.exists():
        return []
    return [{"job": name, **row} for row in json.loads(path.read_text())]


def _alike(found: Mapping[str, Any], now: Mapping[str, Any], model: str | None) -> bool:
    """Whether an arm's figures depend on nothing that differs."""
    if model is None:
        return bool(found["machine"] == now["machine"])
    return model in now["weights"] and bool(found["weights"].get(model) == now["weights"][model])


def _without_job(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "job"}


def _keep(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)


def _line(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v
    )
