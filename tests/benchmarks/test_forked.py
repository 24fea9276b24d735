"""Parts of an experiment in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.experiments import _forked


def linger(place: str) -> None:
    """Says who it is, and stays."""
    Path(place).write_text(str(os.getpid()))
    time.sleep(600)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_part_ends_with_the_experiment(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    code = "from benchmarks.experiments import _forked; from test_forked import linger\n"
    code += f"_forked.PRELOADED = []; _forked.call(linger, ({str(place)!r},), _forked.Path('log'))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(_forked.ROOT)])
    experiment = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        until = time.monotonic() + 120
        while not (place.exists() and place.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        part = int(place.read_text())
        assert is_there(part)
    finally:
        experiment.send_signal(signal.SIGKILL)
        experiment.wait()
    until = time.monotonic() + 20
    while is_there(part) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_there(part)
