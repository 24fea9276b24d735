"""Latency of exported towers, measured so that the comparison holds on a busy machine.

Every candidate is loaded in a fresh process of its own. In each round all of them run one after
the other, in random order, so a disturbance hits all alike; ratios are formed within rounds. The
whole is repeated with new processes. A round is also the unit of the bootstrap, because samples of
one round share their disturbances.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import Progress

from benchmarks import machine
from benchmarks.hosts.local import Artifact, Worker, pick_cores
from export import Unavailable

Samples = NDArray[np.float64]


class Config(BaseModel):
    """The `bench:` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    threads: tuple[int, ...] = (1,)
    """Thread counts to time at; each is pinned to as many cores and gives rows of its own."""
    processes: int = Field(default=2, ge=1)
    """Fresh processes for each candidate, one after the other: load time is their median."""
    rounds: int = Field(default=12, ge=2)
    """Rounds in each process; in a round every candidate runs once, in random order."""
    round_seconds: float = Field(default=0.1, gt=0)
    """Time a candidate has in a round."""
    round_queries: int = Field(default=100, ge=1)
    """Queries after which a candidate's turn in a round ends early."""
    min_queries: int = Field(default=100, ge=1)
    """Queries that every candidate must have run at the end: rounds go on until then."""
    max_seconds: float = Field(default=600, gt=0)
    """Rounds end here at the latest, whatever `min_queries` says; the row is then marked."""
    warmup_seconds: float = Field(default=1.0, ge=0)
    """Longest warm-up; it ends earlier when the median stops falling (by 3 % a step)."""
    discard: int = Field(default=2, ge=0)
    """Queries at the start of each turn that are not counted: the caches are another's."""
    resamples: int = Field(default=500, ge=100)
    """Bootstrap resamples behind each 95 % interval."""
    timeout_seconds: float = Field(default=600, gt=0)
    """A process that does not answer for so long makes its row `unavailable`."""
    seed: int = 0
    """Draws the order within rounds and the bootstrap resamples."""


@dataclass
class Timing:
    """What was measured of one artifact; `unavailable` says why nothing was."""

    artifact: Artifact
    cores: list[int]
    rounds: list[Samples] = field(default_factory=list)
    """Milliseconds of the counted queries of each round; round i of all timings ran together."""
    processor_rounds: list[Samples] = field(default_factory=list)
    """The same queries in processor time: less than on the wall where others took the core."""
    opened: list[dict[str, float]] = field(default_factory=list)
    """load_ms and first_ms of each fresh process."""
    warmups: list[dict[str, float]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    unavailable: str | None = None

    @property
    def num_queries(self) -> int:
        return sum(len(samples) for samples in self.rounds)


def measure(
    artifacts: Sequence[Artifact], cfg: Config, progress: bool = True
) -> tuple[list[Timing], dict[str, Any]]:
    """Time all artifacts against each other; also how busy the machine was meanwhile.

    The timings come in the order of `artifacts`. Raises PocketclipError for more threads than
    cores, or a bundle that cannot be read.
    """
    timings = [Timing(artifact, pick_cores(artifact.threads)) for artifact in artifacts]
    order = random.Random(cfg.seed)
    before = _busy()
    console = Console(stderr=True)
    hidden = not progress or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("latency", total=cfg.processes * cfg.rounds)
        for _ in range(cfg.processes):
            for _ in _session(timings, cfg, order):
                bar.advance(task)
    return timings, _disturbance(before, _busy())


def _session(timings: list[Timing], cfg: Config, order: random.Random) -> Iterator[None]:
    """One fresh process for each artifact that can run, warm-up, and its rounds."""
    with ExitStack() as stack:
        workers: list[tuple[Timing, Worker]] = []
        for timing in timings:
            if timing.unavailable is None and (worker := _open(timing, cfg)):
                stack.callback(worker.close)
                workers.append((timing, worker))
        wanted = cfg.min_queries / cfg.processes
        begun = {id(timing): timing.num_queries for timing, _ in workers}
        end, rounds = time.monotonic() + cfg.max_seconds / cfg.processes, 0
        while workers and (rounds < cfg.rounds or _short(workers, begun, wanted)):
            if time.monotonic() > end:
                break
            workers = _round(workers, cfg, order)
            rounds += 1
            yield
        for timing, worker in workers:
            timing.peaks.append(worker.peak_memory_bytes())


def _short(workers: list[tuple[Timing, Worker]], begun: dict[int, int], wanted: float) -> bool:
    return any(timing.num_queries - begun[id(timing)] < wanted for timing, _ in workers)


def _open(timing: Timing, cfg: Config) -> Worker | None:
    try:
        worker = Worker(timing.artifact, timing.cores, cfg.timeout_seconds)
        timing.warmups.append(_warm_up(worker, cfg))
    except Unavailable as reason:
        timing.unavailable = str(reason)
        return None
    timing.opened.append(worker.opened)
    return worker


def _warm_up(worker: Worker, cfg: Config) -> dict[str, float]:
    """Run until the median of a step is no longer 3 % below the best before it."""
    begin, best, queries = time.monotonic(), np.inf, 0
    while time.monotonic() - begin < cfg.warmup_seconds:
        samples = worker.run(cfg.round_queries, cfg.round_seconds)
        queries += len(samples)
        median = float(np.median(samples[:, 0]))
        if median > 0.97 * best:
            return {"queries": queries, "seconds": time.monotonic() - begin, "steady": True}
        best = min(best, median)
    return {"queries": queries, "seconds": time.monotonic() - begin, "steady": False}


def _round(
    workers: list[tuple[Timing, Worker]], cfg: Config, order: random.Random
) -> list[tuple[Timing, Worker]]:
    """Every worker's turn; those that failed on theirs are left out of what follows."""
    alive = []
    for timing, worker in order.sample(workers, len(workers)):
        try:
            samples = worker.run(cfg.round_queries + cfg.discard, cfg.round_seconds)
        except Unavailable as reason:
            timing.unavailable = str(reason)
            continue
        counted = samples[cfg.discard :] if len(samples) > cfg.discard else samples[-1:]
        timing.rounds.append(counted[:, 0])
        timing.processor_rounds.append(counted[:, 1])
        alive.append((timing, worker))
    return alive


def summarise(timing: Timing, cfg: Config, baseline: Timing | None = None) -> dict[str, Any]:
    """Figures of one timing, with its speed-up over the baseline; empty where unavailable.

    `p50_ms`, `p90_ms`, `iqr_ms`, `min_ms`, `load_ms`, `first_ms`, `peak_memory_bytes`, `drift`
    (median of the last quarter of the rounds over that of the first) and `num_queries`. Processor
    time (`processor_p50_ms`, `processor_speedup`) leaves out the waiting for a core that another
    program held: on a busy machine it is the fairer comparison, for one thread.
    """
    if timing.unavailable is not None or not timing.rounds:
        return {"unavailable": timing.unavailable or "no round was completed"}
    pooled = np.concatenate(timing.rounds)
    low, p50, high, p90 = np.percentile(pooled, [25, 50, 75, 90])
    medians = resampled_medians(timing.rounds, cfg.resamples, cfg.seed)
    quarter = max(1, len(timing.rounds) // 4)
    drift = _median(timing.rounds[-quarter:]) / _median(timing.rounds[:quarter])
    row: dict[str, Any] = {
        "p50_ms": float(p50),
        "p50_ms_ci95": _interval(medians),
        "p90_ms": float(p90),
        "iqr_ms": float(high - low),
        "min_ms": float(pooled.min()),
        "processor_p50_ms": _median(timing.processor_rounds),
        "load_ms": float(np.median([o["load_ms"] for o in timing.opened])),
        "first_ms": float(np.median([o["first_ms"] for o in timing.opened])),
        "peak_memory_bytes": max(timing.peaks) if timing.peaks else None,
        "drift": drift,
        "num_queries": len(pooled),
        "enough_queries": len(pooled) >= cfg.min_queries,
        "steady": all(bool(warmup["steady"]) for warmup in timing.warmups),
    }
    if baseline is not None and baseline.rounds and baseline.unavailable is None:
        theirs = resampled_medians(baseline.rounds, cfg.resamples, cfg.seed)
        row["speedup"] = float(np.median(np.concatenate(baseline.rounds)) / p50)
        row["speedup_ci95"] = _interval(theirs / medians)
        own = row["processor_p50_ms"]
        row["processor_speedup"] = _median(baseline.processor_rounds) / own if own else None
    return row


def resampled_medians(rounds: Sequence[Samples], resamples: int, seed: int) -> Samples:
    """Median of all samples, for each bootstrap resample of whole rounds: [resamples].

    Timings with equally many rounds draw the same rounds, which pairs their ratios.
    """
    pooled = np.concatenate(rounds)
    owner = np.repeat(np.arange(len(rounds)), [len(samples) for samples in rounds])
    order = np.argsort(pooled, kind="stable")
    even = np.full(len(rounds), 1 / len(rounds))
    counts = np.random.default_rng(seed).multinomial(len(rounds), even, size=resamples)
    medians = np.empty(resamples)
    pooled, owner = pooled[order], owner[order]
    for n, count in enumerate(counts):
        total = np.cumsum(count[owner])  # copies of the samples up to each one
        medians[n] = pooled[np.searchsorted(total, total[-1] / 2)]
    return medians


def _median(rounds: Sequence[Samples]) -> float:
    return float(np.median(np.concatenate(rounds)))


def _interval(values: Samples) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _busy() -> dict[str, Any]:
    return {"load": machine.load_average(), "cpu": machine.cpu_seconds(), "at": time.monotonic()}


def _disturbance(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How busy the machine was: one core belongs to the bench itself, as one worker runs at a time.

    `cores_busy` is the mean number of busy cores, `stolen` the share of time that the host of a
    virtual machine kept for itself.
    """
    seconds = after["at"] - before["at"]
    row = {
        "seconds": round(seconds, 1),
        "load_before": before["load"],
        "load_after": after["load"],
        "cores_busy": None,
        "stolen": None,
    }
    if before["cpu"] and seconds > 0:
        spent = {key: after["cpu"][key] - before["cpu"][key] for key in after["cpu"]}
        row["cores_busy"] = round(spent["busy"] / seconds, 2)
        row["stolen"] = round(spent["stolen"] / max(sum(spent.values()), 1e-9), 4)
    return row
