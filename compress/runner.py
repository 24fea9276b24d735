"""Runs a recipe: stages, exports, benchmark and report, each only where its result is not there.

Data flows one way: the recipe's model -> stages -> exports -> benchmark -> report.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import benchmarks.report
import export
from compress import atomic
from compress.gates import check_gates
from compress.jobs import jobs
from compress.manifest import Job, Manifest, locked, open_manifest
from compress.recipe import Recipe

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """One line of `pocketclip plan`."""

    folder: str
    why: str | None
    """Why it would run; None if its result stands."""
    seconds: float | None
    """What it took last time, scaled to the new number of steps; None if unknown."""


def run(recipe: Recipe, out: Path, say: Say) -> None:
    """Run what is not done yet and write the report.

    Raises PocketclipError for bad input, GateFailed if a bound of the recipe is not kept.
    """
    with locked(out):
        manifest = open_manifest(out)
        atomic.write_text(out / "recipe.yaml", recipe.resolved())
        ran: set[str] = set()
        for job in jobs(recipe, out):
            why = manifest.why(job, ran)
            if why is None:
                say(f"{job.folder}: up to date")
                continue
            with _recorded(job, manifest, ran, why, say) as folder:
                job.action(folder)
        if ran or not (out / "report.html").exists():
            benchmarks.report.write(out)
        say(f"report: {out / 'report.html'}" if ran else f"nothing to do: {out / 'report.html'}")
        check_gates(recipe.gates, json.loads((out / "summary.json").read_text())["rows"])


def plan(recipe: Recipe, out: Path) -> list[Planned]:
    """What `run` would do, and why; writes nothing."""
    manifest = open_manifest(out)
    ran: set[str] = set()
    planned = []
    for job in jobs(recipe, out):
        why = manifest.why(job, ran)
        if why is not None:
            ran.add(job.folder)
        planned.append(Planned(job.folder, why, _estimate(job, manifest) if why else 0.0))
    return planned


@contextlib.contextmanager
def _recorded(job: Job, manifest: Manifest, ran: set[str], why: str, say: Say) -> Iterator[Path]:
    """Make the job's folder ready, and record what the block has written into it."""
    say(f"{job.folder}: starts ({why})")
    started = time.perf_counter()
    try:
        yield manifest.begin(job, ran)
    except export.Unavailable as reason:
        say(f"{job.folder}: unavailable ({reason})")
        return
    except OSError as error:
        if error.errno not in atomic.REMEDIES:
            raise
        raise atomic.explain(error, manifest.out / job.folder) from error
    seconds = time.perf_counter() - started
    manifest.finish(job, seconds)
    ran.add(job.folder)
    say(f"{job.folder}: done in {seconds:.1f} s")


def _estimate(job: Job, manifest: Manifest) -> float | None:
    """Seconds from the last time this folder was made, scaled by `steps` where it has them."""
    record = manifest.steps.get(job.folder)
    if record is None:
        return None
    before, after = record["inputs"].get("settings") or {}, job.inputs.get("settings") or {}
    scale = after["steps"] / before["steps"] if before.get("steps") and after.get("steps") else 1.0
    return float(record["seconds"] * scale)
