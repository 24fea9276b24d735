"""Memory of this process and of the converters that it starts, watched while something runs."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.hosts import local
from compress.freed import give_back

INTERVAL_SECONDS = 0.1


class Watch:
    """The highest memory seen since `watching` began."""

    def __init__(self) -> None:
        give_back()
        local.forget_peak()
        self._alone = local.resident_bytes()
        self._forks: set[int] = set()
        self._before = self._together = self._all_bytes()

    def sample(self) -> None:
        """Look at this process and its children once; their peaks need not coincide."""
        self._together = max(self._together, self._all_bytes())

    def _all_bytes(self) -> int:
        """Memory of this process and its children now.

        A program starts as a fork of this process, which for a moment seems to hold all that this
        one holds. A fork counts once it has been seen twice, with what it has of its own.
        """
        children = set(_descendants(os.getpid()))
        forks = {pid for pid in children if _is_fork(pid)}
        lasting, self._forks = forks & self._forks, forks
        further = sum(map(_proportional_bytes, children - forks))
        return local.resident_bytes() + further + sum(map(_private_bytes, lasting))

    @property
    def added_bytes(self) -> int:
        """What stood in memory at the highest point, less what stood there at the start."""
        return max(0, self._together - self._before, local.peak_bytes() - self._alone)


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch until the end of the block: this process exactly, its children ten times a second."""
    watch, done = Watch(), threading.Event()

    def look() -> None:
        while not done.wait(INTERVAL_SECONDS):
            watch.sample()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()


def _descendants(pid: int) -> Iterator[int]:
    """Children of a process, and theirs; none where the system does not list them."""
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, _text(listed).split()):
            yield child
            yield from _descendants(child)


def _is_fork(pid: int) -> bool:
    """Whether a child still is this very program."""
    return _text(Path(f"/proc/{pid}/cmdline")) == _text(Path("/proc/self/cmdline"))


def _proportional_bytes(pid: int) -> int:
    """Memory of a process with what it shares counted in parts, as a browser shares much."""
    found = re.search(r"^Pss:\s+(\d+) kB", _text(Path(f"/proc/{pid}/smaps_rollup")), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    rollup = _text(Path(f"/proc/{pid}/smaps_rollup"))
    return 1024 * sum(map(int, re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE)))


def _text(path: Path) -> str:
    """A file of /proc; empty where its process is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""
