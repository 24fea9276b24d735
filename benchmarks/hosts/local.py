"""This machine as the place where artifacts are timed: one fresh process for each artifact.

A `Worker` is a process that has loaded one tower of one bundle through its exporter's `load` and
then waits; it runs queries only when told, so many workers can live while one runs.
"""

import gc
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import bundles, energy, machine, placement, scopes
from benchmarks.timing import Artifact
from compress.errors import PocketclipError
from export import Unavailable

# Imported once by the process that workers are forked from, so that a fresh worker costs
# milliseconds instead of the seconds that importing torch takes.
PRELOADED = ["torch", "numpy", "onnxruntime", "benchmarks.hosts.local"]
STAYS = 8
"""Queries that a ready input stays in place for: filling in another one each time costs the caches
of a small tower 3 %, which no runtime's own benchmark has."""


class Worker:
    """A process with one tower loaded. Raises Unavailable where its runtime cannot run here."""

    def __init__(
        self,
        artifact: Artifact,
        cores: list[int],
        timeout_seconds: float,
        tower: "type[Tower] | None" = None,
    ) -> None:
        self.artifact, self.timeout_seconds = artifact, timeout_seconds
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, artifact, cores, tower or Tower), daemon=True
        )
        with _without_main():
            self._process.start()
        theirs.close()
        self.opened: dict[str, Any] = self._answer("load")

    def run(self, queries: int, seconds: float) -> NDArray[np.float64]:
        """Up to `queries` queries, stopping after `seconds`: [Q, 2] milliseconds.

        The first column is time on the wall, the second the time that processors spent on it.
        """
        samples: NDArray[np.float64] = self._ask(("run", queries, seconds))
        return samples

    def peak_memory_bytes(self) -> int:
        """Highest resident memory since before loading, less what stood before it."""
        peak: int = self._ask(("peak",))
        return peak

    def placement(self) -> dict[str, Any] | None:
        """Operators of each execution provider or delegate, where the exporter can tell."""
        placed: dict[str, Any] | None = self._ask(("placement",))
        return placed

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, question: tuple[Any, ...]) -> Any:
        with suppress(BrokenPipeError):  # the process is gone: _answer finds out why
            self._pipe.send(question)
        return self._answer(question[0])

    def _answer(self, question: str) -> Any:
        """The worker's answer, its refusal raised here, or an error if it died or hangs."""
        where = f"{self.artifact.folder.name} ({self.artifact.tower} tower)"
        if not self._pipe.poll(self.timeout_seconds):
            self._process.kill()
            raise Unavailable(f"no answer to '{question}' in {self.timeout_seconds:.0f} s")
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=5)
            code = self._process.exitcode
            raise Unavailable(f"its process ended on '{question}' (exit code {code})") from None
        if kind == "unavailable":
            raise Unavailable(value)
        if kind == "error":
            raise PocketclipError(f"timing {where}: {value}")
        return value


def describe(place: str = "") -> dict[str, Any]:
    """What this machine is."""
    if place:
        raise PocketclipError(f"host local:{place}: local takes nothing after the colon")
    return machine.describe()


def meter() -> energy.Meter:
    """This machine's energy counter."""
    return energy.processor()


def pick_cores(threads: int) -> list[int]:
    """The cores that timed processes are pinned to: the last ones, as the first serve interrupts.

    Raises PocketclipError where fewer cores are allowed than threads asked for.
    """
    cores = machine.allowed_cores()
    if threads > len(cores):
        raise PocketclipError(
            f"bench.threads: {threads} threads asked for, but only {len(cores)} cores are allowed"
        )
    return cores[-threads:]


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the running script: a new process would otherwise run it again, up to its main guard.

    Workers need nothing from it, and it may be a notebook or a script without a guard.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _serve(pipe: Connection, artifact: Artifact, cores: list[int], kind: "type[Tower]") -> None:
    """The life of a worker: load, answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its pipe then closes
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    try:
        tower = kind(artifact)
    except Unavailable as reason:
        return pipe.send(("unavailable", str(reason)))
    except PocketclipError as error:
        return pipe.send(("error", str(error)))
    pipe.send(("opened", tower.opened))
    gc.disable()
    while True:
        try:
            question, *arguments = pipe.recv()
        except EOFError:
            return None
        pipe.send(("ok", getattr(tower, question)(*arguments)))


class Tower:
    """Inside the worker: the loaded tower, its queries, and the clock."""

    device = "cpu"
    _stays = STAYS

    def __init__(self, artifact: Artifact) -> None:
        import torch

        torch.set_num_threads(artifact.threads)
        exporter = bundles.opener(artifact.exporter)
        self._artifact = artifact
        self._memory_before = resident_bytes()
        forget_peak()
        start = time.perf_counter_ns()
        encoder = exporter.load(artifact.folder, self.device, artifact.threads)
        loaded = time.perf_counter_ns()
        self._place, self._call, inputs = scopes.pipeline(artifact, encoder)
        self._inputs = scopes.beside(encoder, inputs)
        self._next = 0
        self._stays = STAYS if artifact.scope == "model" else 1
        [(first_ms, _)] = self._in_a_row(1, 0.0)
        self.opened = {"load_ms": (loaded - start) / 1e6, "first_ms": first_ms}

    def _one(self, query: Any) -> float:
        """Milliseconds of one query; by the runtime's own clock where it has one."""
        start = time.perf_counter_ns()
        told = self._call(query)
        end = time.perf_counter_ns()
        return told if isinstance(told, float) else (end - start) / 1e6

    def _in_a_row(self, most: int, end: float) -> list[tuple[float, float]]:
        """Up to `most` queries of the next input, stopping at `end`: [Q, 2] milliseconds.

        Processor time is read around them all, as reading it costs a small query 2 %.
        """
        query = self._place(self._inputs[self._next])
        self._next = (self._next + 1) % len(self._inputs)
        walls: list[float] = []
        processor = time.process_time_ns()
        while len(walls) < most and (not walls or time.perf_counter() < end):
            walls.append(self._one(query))
        spent = (time.process_time_ns() - processor) / 1e6 / len(walls)
        return [(wall, spent) for wall in walls]

    def run(self, queries: int, seconds: float) -> NDArray[np.float64]:
        samples: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds
        while len(samples) < queries and (not samples or time.perf_counter() < end):
            samples += self._in_a_row(min(self._stays, queries - len(samples)), end)
        return np.array(samples)

    def placement(self) -> dict[str, Any] | None:
        return placement.of(self._artifact.folder, self._artifact.tower)

    def peak(self) -> int:
        return max(0, peak_bytes() - self._memory_before)


def _status_bytes(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def peak_bytes() -> int:
    """Highest resident memory of this process.

    VmHWM first: the kernel's ru_maxrss begins at the peak of the process that started this one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return _status_bytes("VmRSS") or peak_bytes()


def forget_peak() -> None:
    """Start VmHWM anew, as a forked process inherits its parent's; only Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
