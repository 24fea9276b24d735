"""Another machine over ssh, where pocketclip is installed: `remote:[USER@]NAME`.

The bundle is copied there once (by its hash), a process there loads it as this machine would, and
questions and answers go through ssh's pipes as lines of JSON. Only the far clock is read.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import Artifact
from compress import atomic
from compress.errors import PocketclipError
from export import Unavailable

CACHE = ".cache/pocketclip/bundles"
PYTHON = "python3"
OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


def ssh(place: str, command: str) -> list[str]:
    """The words that run a command there. Raises Unavailable without ssh or a name."""
    if not place:
        raise Unavailable("name the machine: remote:[USER@]NAME")
    if shutil.which("ssh") is None:
        raise Unavailable("no ssh on this machine")
    return ["ssh", *OPTIONS, place, command]


def ask(place: str, command: str, data: bytes | None = None) -> str:
    """What a command there prints. Raises Unavailable with what ssh said."""
    done = subprocess.run(ssh(place, command), input=data, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise Unavailable(f"{place}: {said or f'exit code {done.returncode}'}")
    return done.stdout.decode()


def describe(place: str = "") -> dict[str, Any]:
    """The other machine, in the words of its own `benchmarks.machine`."""
    script = "import json; from benchmarks import machine; print(json.dumps(machine.describe()))"
    about: dict[str, Any] = json.loads(ask(place, f'{PYTHON} -c "{script}"'))
    return about


def pick_cores(threads: int) -> list[int]:
    """The far side picks from its own cores."""
    return []


class Worker:
    """A process on the other machine with one tower loaded."""

    def __init__(self, artifact: Artifact, cores: list[int], timeout_seconds: float) -> None:
        place = artifact.host.partition(":")[2]
        folder = _copied(artifact.folder, place)
        about = {
            "exporter": artifact.exporter,
            "folder": folder,
            "tower": artifact.tower,
            "threads": artifact.threads,
            "scope": artifact.scope,
            "index_size": artifact.index_size,
        }
        command = f"{PYTHON} -m benchmarks.hosts.remote"
        self._process = subprocess.Popen(
            ssh(place, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.opened: dict[str, Any] = self._ask({"open": about, "timeout": timeout_seconds})

    def run(self, queries: int, seconds: float) -> NDArray[np.float64]:
        """[Q, 2] milliseconds of the far clocks."""
        return np.array(self._ask({"run": [queries, seconds]}), dtype=np.float64)

    def peak_memory_bytes(self) -> int | None:
        peak: int | None = self._ask({"peak_memory_bytes": []})
        return peak

    def placement(self) -> dict[str, Any] | None:
        placed: dict[str, Any] | None = self._ask({"placement": []})
        return placed

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unavailable("the connection ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"the connection ended on {next(iter(question))!r}")
        answer = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer["value"]


def _copied(folder: Path, place: str) -> str:
    """Where the bundle lies there, after copying it if it does not yet."""
    digest = atomic.sha256(folder / "bundle.json")[:16]
    there = f"{CACHE}/{digest}"
    if ask(place, f"test -f {there}/bundle.json && echo yes || true").strip() != "yes":
        packed = subprocess.run(
            ["tar", "-C", str(folder), "-cf", "-", "."], capture_output=True, check=True
        )
        ask(place, f"mkdir -p {there} && tar -C {there} -xf -", packed.stdout)
    return there


def serve() -> None:
    """The far side: one worker of this machine, asked through stdin, answering on stdout."""
    worker = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "open" in question:
                worker = _open(question["open"], question["timeout"])
                value: Any = worker.opened
            else:
                [(name, arguments)] = question.items()
                value = getattr(worker, name)(*arguments)
        except (Unavailable, PocketclipError) as reason:
            answer: dict[str, Any] = {"unavailable": str(reason)}
        else:
            answer = {"value": value.tolist() if hasattr(value, "tolist") else value}
        print(json.dumps(answer), flush=True)
    if worker is not None:
        worker.close()


def _open(about: dict[str, Any], timeout_seconds: float) -> Any:
    from benchmarks import bundles
    from benchmarks.hosts import local

    folder = Path.home() / about.pop("folder")
    queries = bundles.read(folder).queries(about["tower"])
    artifact = replace(Artifact(inputs=queries, folder=folder, **about), host="local")
    return local.Worker(artifact, local.pick_cores(artifact.threads), timeout_seconds)


if __name__ == "__main__":
    serve()
