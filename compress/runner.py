"""Runs a recipe: stages, exports, benchmark and report, each only where its result is not there.

Data flows one way: the recipe's model -> stages -> exports -> benchmark -> report.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import benchmarks.report
import export
from compress import atomic, estimate, parallel
from compress.gates import check_gates
from compress.jobs import jobs, joinable
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
    """What it took last time, scaled to the new number of steps, or a forecast; None if unknown."""


def run(recipe: Recipe, out: Path, say: Say) -> None:
    """Run what is not done yet and write the report.

    Raises PocketclipError for bad input, GateFailed if a bound of the recipe is not kept.
    """
    with locked(out):
        manifest = open_manifest(out)
        atomic.write_text(out / "recipe.yaml", recipe.resolved())
        decided = _decide(jobs(recipe, out), manifest)
        _retire([job.folder for job, _ in decided], out, say)
        manifest.forget([job for job, why in decided if why])
        ran: set[str] = set()
        for job, decision in decided:
            # Again, because an export that was unavailable may have become available.
            why = decision or manifest.why(job, ran)
            if why is None:
                say(f"{job.folder}: up to date")
                continue
            with _recorded(job, manifest, ran, why, say) as folder:
                parallel.announce(job.folder)
                job.action(folder)
        if ran or not (out / "report.html").exists():
            benchmarks.report.write(out)
        say(f"{'report' if ran else 'nothing to do'}: {out / 'report.html'}")
        check_gates(recipe.gates, json.loads((out / "summary.json").read_text())["rows"])


def run_on_all(recipe: Recipe, out: Path, say: Say) -> None:
    """`run`, by all processes that torchrun has started, or by this one."""
    on_gpu = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    parallel.start("cuda" if on_gpu else "cpu")
    try:
        if parallel.rank():
            follow(recipe, out)
            return
        run(recipe, out, say)
        parallel.announce(None)
    finally:
        parallel.stop()


def follow(recipe: Recipe, out: Path) -> None:
    """What the further processes of a torchrun do: train along where the first one trains."""
    steps = joinable(recipe, out)
    while (folder := parallel.announce()) is not None:
        if folder in steps:
            steps[folder](out / folder)


def plan(recipe: Recipe, out: Path) -> list[Planned]:
    """What `run` would do, and why; writes nothing."""
    manifest = open_manifest(out)
    decided = _decide(jobs(recipe, out), manifest)
    unknown = any(why and job.folder not in manifest.steps for job, why in decided)
    forecast = estimate.forecast(recipe) if unknown else {}
    return [
        Planned(job.folder, why, _seconds(job, manifest, forecast) if why else 0.0)
        for job, why in decided
    ]


def _decide(found: list[Job], manifest: Manifest) -> list[tuple[Job, str | None]]:
    """Each job with the reason why it has to run, or None."""
    going: set[str] = set()
    decided = []
    for job in found:
        why = manifest.why(job, going)
        decided.append((job, why))
        if why is not None and why != "was unavailable":
            going.add(job.folder)
    return decided


def _retire(planned: list[str], out: Path, say: Say) -> None:
    """Move folders of steps that the recipe no longer has out of the way of the report."""
    for folder in [*out.glob("[0-9][0-9]-*"), *(out / "export").glob("[!.]*")]:
        name = str(folder.relative_to(out))
        if name not in planned:
            (out / "old").mkdir(exist_ok=True)
            shutil.rmtree(out / "old" / folder.name, ignore_errors=True)
            folder.replace(out / "old" / folder.name)
            say(f"{name}: no longer in the recipe, moved to {out / 'old' / folder.name}")


@contextlib.contextmanager
def _recorded(job: Job, manifest: Manifest, ran: set[str], why: str, say: Say) -> Iterator[Path]:
    """Make the job's folder ready, and record what the block has written into it."""
    say(f"{job.folder}: starts ({why})")
    started = time.perf_counter()
    try:
        yield manifest.begin(job)
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


def _seconds(job: Job, manifest: Manifest, forecast: dict[str, float]) -> float | None:
    """What the job took last time, scaled by its number of steps; else the forecast, if any."""
    record = manifest.steps.get(job.folder)
    if record is None:
        return forecast.get(job.folder)
    before, after = _num_steps(record["inputs"]), _num_steps(job.inputs)
    return float(record["seconds"] * (after / before if before and after else 1.0))


def _num_steps(inputs: dict[str, Any]) -> int | None:
    steps = (inputs.get("settings") or {}).get("steps")
    return int(steps) if steps else None
