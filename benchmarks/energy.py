"""Energy counters of this machine: RAPL of x86 processors, NVML of NVIDIA GPUs, or none."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Meter:
    """Joules that a whole device has used since some moment, whoever used them.

    An idle device uses energy too, so the figure of a query is an upper bound of its cost.
    """

    joules: Callable[[], float | None]
    """The counter's state; only differences mean something. None where there is none."""
    method: str
    """What is counted, or why nothing is."""


def none(reason: str) -> Meter:
    """A meter for where nothing can be read."""
    return Meter(lambda: None, f"not measured: {reason}")


def processor(root: Path = POWERCAP) -> Meter:
    """The packages' RAPL counters, which most systems since 2020 show to root alone."""
    zones = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    counters = [zone / "energy_uj" for zone in zones]

    def read() -> float | None:
        try:
            return sum(int(counter.read_text()) for counter in counters) / 1e6
        except (OSError, ValueError):
            return None

    if not counters:
        return none("this machine shows no RAPL counter")
    if read() is None:
        return none(f"{counters[0]} may be read by root alone")
    return Meter(read, f"RAPL, {len(counters)} processor package(s), idle power included")


def gpu(index: int = 0) -> Meter:
    """The board's NVML counter."""
    try:
        import pynvml
    except ImportError:
        return none("NVML needs `pip install nvidia-ml-py`")
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return none(f"NVML says: {error}")
    millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption
    return Meter(lambda: millijoules(handle) / 1e3, "NVML, whole board, idle power included")


def spent(before: float | None, after: float | None) -> float | None:
    """Joules between two readings; None where unknown, or where the counter has wrapped round."""
    if before is None or after is None or after < before:
        return None
    return after - before
