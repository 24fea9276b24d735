"""What every exporter promises, tried on one model: the tests and the matrix of targets use it."""

import os
import time
from pathlib import Path
from typing import Any, get_args

from compress import plugin
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.fold import fold
from compress.twin import float_twin
from export import Unavailable, _bundle, _verify

FIGURES = (
    "worst_cosine",
    "p1_cosine",
    "overlap_at_10",
    "reordered_cosine",
    "alone_cosine",
    "padded_cosine",
    "full_cosine",
)


def cases() -> list[tuple[str, str | None]]:
    """Every exporter with every precision that its Config allows: a new file is in the list."""
    found: list[tuple[str, str | None]] = []
    for target in plugin.names(plugin.EXPORTERS):
        field = plugin.find(plugin.EXPORTERS, target).Config.model_fields.get("precision")
        found += [(target, name) for name in (get_args(field.annotation) if field else (None,))]
    return found


def prove(clip: Clip, target: str, precision: str | None, out: Path) -> list[dict[str, Any]]:
    """Export, open from the files, replay the goldens -> a row per tower.

    `passed` with the figures of the parity gate, or the `reason`: Unavailable, a gate or refusal in
    the exporter's own words. Errors of a converter's own are not caught. Training branches are
    folded and schemes an exporter does not know are left out, as in a run.
    """
    about = {"target": target, "precision": precision}
    exporter = plugin.find(plugin.EXPORTERS, target)
    clip = fold(clip) if getattr(exporter, "HONOURS_SCHEME", False) else float_twin(fold(clip))
    cfg = exporter.Config(**({} if precision is None else {"precision": precision}))
    started, spent = time.perf_counter(), _processor_seconds()
    try:
        exporter.write(clip, cfg, out)
        seconds = time.perf_counter() - started
        spent = _processor_seconds() - spent
        bundle = _verify.read(out)
        goldens = _verify.verify(out) if bundle["executed"] else {}
    except (PocketclipError, Unavailable) as error:
        kind = "unavailable" if isinstance(error, Unavailable) else "refused"
        row = {**about, "passed": False, "kind": kind, "reason": str(error)}
        return [{**row, "tower": tower} for tower in _bundle.TOWERS]
    return [
        {**about, **_row(out, bundle, tower), "golden_cosine": goldens.get(tower)}
        | {"seconds": round(seconds, 1), "processor_seconds": round(spent, 1)}
        for tower in _bundle.TOWERS
    ]


def _processor_seconds() -> float:
    """Time that processors spent on this process and on converters that it waited for."""
    return sum(os.times()[:4])


def _row(out: Path, bundle: dict[str, Any], tower: str) -> dict[str, Any]:
    """One tower of a bundle that was written."""
    files = [name for name in bundle["files"] if name.split(".")[0].split("/")[0] == tower]
    files = files or [name for name in bundle["files"] if name == bundle[tower]["file"]]
    parity = bundle["parity"][tower]
    executed = bundle["executed"]
    return {
        "tower": tower,
        "passed": True,
        "kind": "executed" if executed else "simulated",
        "reason": None if executed else bundle["unavailable"],
        **{key: parity[key] for key in FIGURES if key in parity},
        "size_bytes": sum((out / name).stat().st_size for name in files),
        "runtime": bundle["runtime"].get(tower),
    }
