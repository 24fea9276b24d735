"""A peer's own process, which may do its work and then not end, or never come to an end."""

import os
import signal
import subprocess
import time
from pathlib import Path

GRACE_SECONDS = 20.0
"""Time that a process has to end by itself once its result is there."""


def run(command: list[str], cwd: Path, log: Path, result: Path, limit_seconds: float) -> str | None:
    """Run a command until it ends, or `result` lies there and the grace is over, or the limit.

    Returns what a reader must know of how it ended, None where it ended by itself with exit code 0.
    No result means failure: the last line of the log is the reason.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        ended = _waited(process, result, limit_seconds)
    if ended is not None:
        return ended
    if process.returncode == 0:
        return None
    last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
    return f"failed: {''.join(last)[:300]}"


def _waited(process: "subprocess.Popen[bytes]", result: Path, limit: float) -> str | None:
    """Why the process had to be ended; None where it ended by itself."""
    started, written = time.monotonic(), None
    while process.poll() is None:
        now = time.monotonic()
        if written is None and result.exists():
            written = now
        late = now - started > limit
        if late or (written is not None and now - written > GRACE_SECONDS):
            os.killpg(process.pid, signal.SIGKILL)  # the children that it started too
            process.wait()
            if written is not None:
                return "its process did not end after its files were written: ended by us"
            return f"not done after {limit / 60:g} minutes"
        time.sleep(0.2)
    return None
