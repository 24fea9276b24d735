"""Latency of exported towers, measured so that the comparison holds on a busy machine.

Every candidate is loaded in a fresh process of its own. In each round all of them run one after
the other, in random order, so a disturbance hits all alike; ratios are formed within rounds. The
whole is repeated with new processes. Peak memory is read in processes that are not timed.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks import energy, machine
from benchmarks.statistics import relative_width, throttled
from benchmarks.timing import Artifact, Config, Timing, Worker
from compress import plugin
from export import Unavailable


def measure(
    artifacts: Sequence[Artifact], cfg: Config, progress: bool = True
) -> tuple[list[Timing], dict[str, dict[str, Any]]]:
    """Time all artifacts against each other, host by host; also what each host was like meanwhile.

    The timings come in the order of `artifacts`. Raises PocketclipError for more threads than
    cores, an unknown host, or a bundle that cannot be read.
    """
    timings = [Timing(artifact, []) for artifact in artifacts]
    console = Console(stderr=True)
    hidden = not progress or not console.is_terminal
    hosts = {}
    with Progress(console=console, transient=True, disable=hidden) as bar:
        for name in dict.fromkeys(artifact.host for artifact in artifacts):
            own = [timing for timing in timings if timing.artifact.host == name]
            if progress and not console.is_terminal:  # a log shows no bar
                console.print(f"latency on {name}: {_announced(own, cfg)}", highlight=False)
            task = bar.add_task(f"latency on {name}", total=cfg.processes * cfg.rounds)
            hosts[name] = _measure(name, own, cfg, lambda task=task: bar.advance(task))
    return timings, hosts


def _announced(timings: Sequence[Timing], cfg: Config) -> str:
    """What is about to take a while, and how long at least and at most."""
    least = cfg.processes * cfg.rounds * len(timings) * cfg.round_seconds
    most = max(least, cfg.max_seconds)
    return (
        f"{len(timings)} towers, {least:.0f} s of queries, at most {most:.0f} s on a busy machine"
    )


def _measure(name: str, timings: list[Timing], cfg: Config, advance: Any) -> dict[str, Any]:
    """All artifacts of one host -> its description, how busy it was, and whether it slowed down."""
    kind, _, place = name.partition(":")
    host = plugin.find(plugin.HOSTS, kind)
    try:
        about = host.describe(place)
    except Unavailable as reason:
        for timing in timings:
            timing.unavailable = str(reason)
        return {"unavailable": str(reason)}
    meter = host.meter() if hasattr(host, "meter") else energy.none(f"{kind} shows no counter")
    for timing in timings:
        timing.cores = host.pick_cores(timing.artifact.threads)
    order = random.Random(cfg.seed)
    before = _busy()
    for process in range(cfg.processes):
        for _ in _session(timings, cfg, order, host, meter, process):
            advance()
    after = _busy()
    for timing in timings:
        _aside(timing, cfg, host)
    return {
        "machine": about,
        "energy": meter.method,
        "throttled": throttled([t for t in timings if t.unavailable is None]),
        "disturbance": _disturbance(before, after) if kind == "local" else {},
    }


def _session(
    timings: list[Timing],
    cfg: Config,
    order: random.Random,
    host: ModuleType,
    meter: energy.Meter,
    process: int,
) -> Iterator[None]:
    """One fresh process for each artifact that can run, warm-up, and its rounds."""
    with ExitStack() as stack:
        workers: list[tuple[Timing, Worker]] = []
        for timing in timings:
            if timing.unavailable is None and (worker := _open(timing, cfg, host)):
                stack.callback(worker.close)
                workers.append((timing, worker))
        share = (process + 1) / cfg.processes
        begin, rounds = time.monotonic(), 0
        planned_end = begin
        while workers and time.monotonic() < begin + cfg.max_seconds / cfg.processes:
            if rounds >= cfg.rounds and not any(_short(t, cfg, share) for t, _ in workers):
                patient = time.monotonic() < planned_end + cfg.patience_seconds
                if share < 1 or not patient or not any(_wide(t, cfg) for t, _ in workers):
                    break
            workers = _round(workers, cfg, order, meter, process)
            rounds += 1
            if rounds <= cfg.rounds:
                planned_end = time.monotonic()
            yield


def _short(timing: Timing, cfg: Config, share: float) -> bool:
    """Whether it lacks queries or time, of what is wanted by the end of this process."""
    return timing.num_queries < cfg.min_queries * share or timing.seconds < cfg.min_seconds * share


def _wide(timing: Timing, cfg: Config) -> bool:
    return relative_width(timing, cfg) > cfg.max_interval


def _open(timing: Timing, cfg: Config, host: ModuleType) -> Worker | None:
    try:
        worker: Worker = host.Worker(timing.artifact, timing.cores, cfg.timeout_seconds)
        timing.warmups.append(_warm_up(worker, cfg))
    except Unavailable as reason:
        timing.unavailable = str(reason)
        return None
    timing.opened.append(worker.opened)
    return worker


def _warm_up(worker: Worker, cfg: Config) -> dict[str, Any]:
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
    workers: list[tuple[Timing, Worker]],
    cfg: Config,
    order: random.Random,
    meter: energy.Meter,
    process: int,
) -> list[tuple[Timing, Worker]]:
    """Every worker's turn; those that failed on theirs are left out of what follows."""
    alive = []
    for timing, worker in order.sample(workers, len(workers)):
        before = meter.joules()
        try:
            samples = worker.run(cfg.round_queries + cfg.discard, cfg.round_seconds)
        except Unavailable as reason:
            timing.unavailable = str(reason)
            continue
        joules = energy.spent(before, meter.joules())
        if joules is not None:
            timing.joules.append(joules / len(samples))
        counted = samples[cfg.discard :] if len(samples) > cfg.discard else samples[-1:]
        timing.rounds.append(counted[:, 0])
        timing.processor_rounds.append(counted[:, 1])
        timing.process_of_round.append(process)
        alive.append((timing, worker))
    return alive


def _aside(timing: Timing, cfg: Config, host: ModuleType) -> None:
    """Peak memory and placement, in a process of their own: looking would disturb the clock."""
    if timing.unavailable is not None:
        return
    with ExitStack() as stack:
        stack.enter_context(suppress(Unavailable))  # the timing stands without it
        worker: Worker = host.Worker(timing.artifact, timing.cores, cfg.timeout_seconds)
        stack.callback(worker.close)
        worker.run(cfg.memory_queries, cfg.round_seconds)
        peak = worker.peak_memory_bytes()
        timing.peaks += [] if peak is None else [peak]
        timing.placement = worker.placement()


def _busy() -> dict[str, Any]:
    return {
        "load": machine.load_average(),
        "cpu": machine.cpu_seconds(),
        "heat": machine.heat(),
        "at": time.monotonic(),
    }


def _disturbance(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How busy the machine was: one core belongs to the bench itself, as one worker runs at a time.

    `cores_busy` is the mean number of busy cores, `stolen` the share of time that the host of a
    virtual machine kept for itself; `heat_before` and `heat_after` what sensors said.
    """
    seconds = after["at"] - before["at"]
    row = {
        "seconds": round(seconds, 1),
        "load_before": before["load"],
        "load_after": after["load"],
        "heat_before": before["heat"],
        "heat_after": after["heat"],
        "cores_busy": None,
        "stolen": None,
    }
    if before["cpu"] and seconds > 0:
        spent = {key: after["cpu"][key] - before["cpu"][key] for key in after["cpu"]}
        row["cores_busy"] = round(spent["busy"] / seconds, 2)
        row["stolen"] = round(spent["stolen"] / max(sum(spent.values()), 1e-9), 4)
    return row
