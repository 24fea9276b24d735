"""An Android phone over adb: bundles are pushed, and the runtime's own benchmark binary times them.

The binary lies where a user has put it, `/data/local/tmp/pocketclip/` on the phone:
`onnxruntime_perf_test` for .onnx files (its verbose mode tells every query), `benchmark_model` for
.tflite (it tells the mean of its queries alone, so that a turn gives one sample).
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import Artifact
from compress.errors import PocketclipError
from export import Unavailable, _verify

HOME = "/data/local/tmp/pocketclip"
RUNNERS = {".onnx": "onnxruntime_perf_test", ".tflite": "benchmark_model"}
ITERATION = re.compile(r"iteration:\d+,time_cost:([\d.eE+-]+)")
MEAN = re.compile(r"Inference \(avg\): ([\d.eE+-]+)")
FIRST = re.compile(r"First inference: ([\d.eE+-]+)")
INIT = re.compile(r"Init: ([\d.eE+-]+)")
CREATED = re.compile(r"Session creation time cost: ([\d.eE+-]+) s")
PEAKS = {
    re.compile(r"Peak working set size: (\d+) bytes"): 1,
    re.compile(r"Memory footprint delta .*? overall=([\d.]+)"): 2**20,
}
"""How the binaries tell peak memory, with the bytes of their unit."""
PROPERTIES = {
    "model": "ro.product.model",
    "soc": "ro.soc.model",
    "android": "ro.build.version.release",
    "architecture": "ro.product.cpu.abi",
}
HOT = 3
"""Thermal status from which Android throttles (SEVERE)."""


def adb(place: str, *words: str, timeout: float = 60) -> str:
    """What adb prints. Raises Unavailable where there is no adb, no phone, or no answer."""
    program = shutil.which("adb")
    if program is None:
        raise Unavailable("no adb on this machine: install Android's platform-tools")
    serial = ["-s", place] if place else []
    try:
        done = subprocess.run(
            [program, *serial, *words], capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"adb {words[0]} gave no answer in {timeout:.0f} s") from None
    if done.returncode:
        raise Unavailable(
            f"adb {' '.join(words)[:60]}: {(done.stderr or done.stdout).strip()[:200]}"
        )
    return done.stdout


def describe(place: str = "") -> dict[str, Any]:
    """The phone and its state: model, chip, Android, battery, thermal status (0 is cool)."""
    about: dict[str, Any] = {
        name: adb(place, "shell", "getprop", key).strip() for name, key in PROPERTIES.items()
    }
    battery = adb(place, "shell", "dumpsys", "battery")
    level = re.search(r"level: (\d+)", battery)
    celsius = re.search(r"temperature: (\d+)", battery)
    about["battery_percent"] = int(level.group(1)) if level else None
    about["battery_celsius"] = int(celsius.group(1)) / 10 if celsius else None
    about["plugged"] = bool(re.search(r"(AC|USB|Wireless) powered: true", battery))
    about["thermal_status"] = thermal_status(place)
    return about


def thermal_status(place: str = "") -> int | None:
    """Android's own word for how hot it is, 0 to 6; None before Android 10."""
    found = re.search(r"Thermal Status: (\d)", adb(place, "shell", "dumpsys", "thermalservice"))
    return int(found.group(1)) if found else None


def pick_cores(threads: int) -> list[int]:
    """Phones choose cores themselves: pinning needs rights that adb has not."""
    return []


class Worker:
    """One tower on the phone; every turn is a run of the binary, its loading not counted."""

    def __init__(self, artifact: Artifact, cores: list[int], timeout_seconds: float) -> None:
        self._place = artifact.host.partition(":")[2]
        self._artifact, self._timeout = artifact, timeout_seconds
        if artifact.scope != "model":
            raise Unavailable(f"scope {artifact.scope} is timed on this machine only")
        name = _verify.read(artifact.folder)[artifact.tower]["file"]
        suffix = Path(name).suffix
        if suffix not in RUNNERS:
            raise Unavailable(f"no benchmark binary is known for {suffix} files on Android")
        self._binary = f"{HOME}/{RUNNERS[suffix]}"
        listing = adb(self._place, "shell", f"ls {self._binary} 2>/dev/null || true")
        if self._binary not in listing:
            raise Unavailable(f"the phone has no {self._binary}: build it for arm64 and push it")
        digest = _verify.read(artifact.folder)["files"][name].removeprefix("sha256:")[:12]
        self._folder = f"{HOME}/{digest}-{artifact.tower}"
        self._file = f"{self._folder}/{name}"
        self._push(name)
        self._said = ""
        load_ms, first_ms = self._loading()
        self.opened: dict[str, Any] = {"load_ms": load_ms, "first_ms": first_ms}

    def run(self, queries: int, seconds: float) -> NDArray[np.float64]:
        """[Q, 2]: milliseconds on the wall; processor time is not told (NaN)."""
        status = thermal_status(self._place)
        if status is not None and status >= HOT:
            raise Unavailable(f"the phone is too hot (thermal status {status}): let it cool down")
        self._said = self._execute(queries, seconds)
        wall = np.array(samples_ms(self._said))
        return np.stack([wall, np.full(len(wall), np.nan)], axis=1)

    def peak_memory_bytes(self) -> int | None:
        """As the binary told on its last run; None where it told nothing."""
        return peak_bytes(self._said)

    def placement(self) -> dict[str, Any] | None:
        """Not told by these binaries."""
        return None

    def close(self) -> None:
        """Remove the pushed files; the binary stays."""
        adb(self._place, "shell", f"rm -rf {self._folder}")

    def _push(self, name: str) -> None:
        adb(self._place, "shell", f"mkdir -p {self._folder}")
        stem = Path(name).stem
        for path in sorted(self._artifact.folder.glob(f"{stem}.*")):
            adb(self._place, "push", str(path), self._folder + "/", timeout=self._timeout)

    def _loading(self) -> tuple[float, float]:
        """Milliseconds of loading and of the first query."""
        said = self._execute(1, 1.0)
        if created := CREATED.search(said):
            return float(created.group(1)) * 1e3, samples_ms(said)[0]
        init, first = INIT.search(said), FIRST.search(said)
        if init is None or first is None:
            raise Unavailable(f"{self._binary} told no times: {said.strip()[-200:]}")
        return float(init.group(1)) / 1e3, float(first.group(1)) / 1e3

    def _execute(self, queries: int, seconds: float) -> str:
        threads = self._artifact.threads
        if self._binary.endswith("onnxruntime_perf_test"):
            command = f"{self._binary} -v -I -m times -r {queries} -x {threads} -y 1 {self._file}"
        else:
            limits = f"--num_runs={queries} --max_secs={seconds} --min_secs=0"
            command = f"{self._binary} --graph={self._file} --num_threads={threads} {limits}"
        return adb(self._place, "shell", f"{command} 2>&1", timeout=self._timeout)


def peak_bytes(said: str) -> int | None:
    """Peak memory that a binary told; None where it told nothing."""
    told = ((pattern.search(said), unit) for pattern, unit in PEAKS.items())
    return next((int(float(found.group(1)) * unit) for found, unit in told if found), None)


def samples_ms(said: str) -> list[float]:
    """Milliseconds of each query that a binary told; one mean where it tells no more.

    Raises PocketclipError where it told nothing.
    """
    each = [float(found) * 1e3 for found in ITERATION.findall(said)]  # told in seconds
    mean = MEAN.search(said)
    if not each and mean is None:
        raise PocketclipError(f"android: the benchmark binary told no times: {said.strip()[-200:]}")
    return each or [float(mean.group(1)) / 1e3] if mean else each  # told in microseconds
