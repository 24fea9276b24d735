"""Figures of timings: percentiles where there are samples for them, intervals, drift, ratios.

A round is the unit of the bootstrap, because samples of one round share their disturbances.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.timing import Config, Samples, Timing

TAIL = 10
"""Samples that must lie beyond a percentile for it to be given: p90 needs 100, p99 needs 1000."""
DRIFTED = 1.1
"""Last quarter of the rounds over the first: above it the machine has become slower."""


def summarise(timing: Timing, cfg: Config, baseline: Timing | None = None) -> dict[str, Any]:
    """Figures of one timing, with its speed-up over the baseline; only a reason where unavailable.

    `p50_ms`, `p90_ms`, `p99_ms` (None with fewer than ten samples beyond them), `iqr_ms`, `min_ms`,
    `load_ms`, `first_ms`, `peak_memory_bytes`, `energy_mj`, `process_spread` (slowest process'
    median over the fastest's), `drift` (median of the last quarter of the rounds over that of the
    first) and `num_queries`. Processor time (`processor_p50_ms`, `processor_speedup`) leaves out
    the waiting for a core that another program held: on a busy machine it is the fairer comparison,
    for one thread.
    """
    if timing.unavailable is not None or not timing.rounds:
        return {"unavailable": timing.unavailable or "no round was completed"}
    pooled = np.concatenate(timing.rounds)
    low, p50, high = np.percentile(pooled, [25, 50, 75])
    medians = resampled_medians(timing.rounds, cfg.resamples, cfg.seed)
    row: dict[str, Any] = {
        "p50_ms": float(p50),
        "p50_ms_ci95": interval(medians),
        "p90_ms": percentile(pooled, 90),
        "p99_ms": percentile(pooled, 99),
        "iqr_ms": float(high - low),
        "min_ms": float(pooled.min()),
        "processor_p50_ms": known_median(timing.processor_rounds),
        "load_ms": float(np.median([o["load_ms"] for o in timing.opened])),
        "first_ms": float(np.median([o["first_ms"] for o in timing.opened])),
        "peak_memory_bytes": max(timing.peaks) if timing.peaks else None,
        "energy_mj": 1e3 * float(np.median(timing.joules)) if timing.joules else None,
        "process_spread": _process_spread(timing),
        "drift": drift(timing),
        "num_queries": len(pooled),
        "enough_queries": len(pooled) >= cfg.min_queries and timing.seconds >= cfg.min_seconds,
        "steady": all(bool(warmup["steady"]) for warmup in timing.warmups),
        "placement": timing.placement,
    }
    if baseline is not None and baseline.rounds and baseline.unavailable is None:
        theirs = resampled_medians(baseline.rounds, cfg.resamples, cfg.seed)
        row["speedup"] = float(np.median(np.concatenate(baseline.rounds)) / p50)
        row["speedup_ci95"] = interval(theirs / medians)
        own, other = row["processor_p50_ms"], known_median(baseline.processor_rounds)
        row["processor_speedup"] = other / own if own and other else None
    return row


def percentile(pooled: Samples, percent: int) -> float | None:
    """The percentile of all samples; None where fewer than `TAIL` of them lie beyond it."""
    if len(pooled) * (100 - percent) < 100 * TAIL:
        return None
    return float(np.percentile(pooled, percent))


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


def relative_width(timing: Timing, cfg: Config) -> float:
    """Width of the median's 95 % interval as a share of the median; from few resamples."""
    low, high = interval(resampled_medians(timing.rounds, 200, cfg.seed))
    return (high - low) / float(np.median(np.concatenate(timing.rounds)))


def drift(timing: Timing) -> float:
    """Median of the last quarter of the rounds over that of the first."""
    quarter = max(1, len(timing.rounds) // 4)
    return median(timing.rounds[-quarter:]) / median(timing.rounds[:quarter])


def throttled(timings: Sequence[Timing]) -> bool | None:
    """Whether all artifacts became slower together, as when a machine grows hot; None unknown.

    One artifact alone that drifts has a reason of its own; a hot machine slows down everything.
    """
    drifts = [drift(timing) for timing in timings if len(timing.rounds) >= 8]
    return min(drifts) > DRIFTED if drifts else None


def median(rounds: Sequence[Samples]) -> float:
    return float(np.median(np.concatenate(rounds)))


def known_median(rounds: Sequence[Samples]) -> float | None:
    """The median of samples that a host may not tell (NaN)."""
    found = median(rounds)
    return found if np.isfinite(found) else None


def interval(values: Samples) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _process_spread(timing: Timing) -> float | None:
    """How far fresh processes of the same files differ: memory layout alone can make some slow."""
    processes = sorted(set(timing.process_of_round))
    if len(processes) < 2:
        return None
    medians = [
        median([s for s, owner in zip(timing.rounds, timing.process_of_round) if owner == process])
        for process in processes
    ]
    return max(medians) / min(medians)
