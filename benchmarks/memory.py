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
        self._before = self._together = _all_bytes()

    def sample(self) -> None:
        """Look at this process and its children once; their peaks need not coincide."""
        self._together = max(self._together, _all_bytes())

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


def _all_bytes() -> int:
    """Memory of this process and its children now."""
    return local.resident_bytes() + sum(_further_bytes(n) for n in _descendants(os.getpid()))


def _descendants(pid: int) -> Iterator[int]:
    """Children of a process, and theirs; none where the system does not list them."""
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, _text(listed).split()):
            yield child
            yield from _descendants(child)


def _further_bytes(pid: int) -> int:
    """Memory of a child beside this process's.

    What it shares is counted in parts, as a browser shares much. A fork of this very process, about
    to become another program, has most of its pages from here: those count once, here.
    """
    forked = _text(Path(f"/proc/{pid}/cmdline")) == _text(Path("/proc/self/cmdline"))
    kinds = r"Private_\w+" if forked else "Pss"
    pattern = rf"^{kinds}:\s+(\d+) kB"
    found = re.findall(pattern, _text(Path(f"/proc/{pid}/smaps_rollup")), re.MULTILINE)
    return sum(map(int, found)) * 1024


def _text(path: Path) -> str:
    """A file of /proc; empty where its process is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""
