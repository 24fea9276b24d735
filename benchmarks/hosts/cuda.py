"""An NVIDIA GPU of this machine: exporters' `load` with device cuda, timed by CUDA events.

Of a torch model, whose inputs lie on the GPU beforehand, the events bracket the query alone,
launches included; runtimes that take arrays from the host (ONNX Runtime, TensorRT through its
exporter) are timed with their copies, the stream synchronised before the clock stops.
"""

import time
from typing import Any

from benchmarks import energy, machine
from benchmarks.hosts import local
from benchmarks.timing import Artifact
from export import Unavailable


def describe(place: str = "") -> dict[str, Any]:
    """The GPU. Raises Unavailable where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device, or a torch without CUDA")
    index = int(place or 0)
    about = torch.cuda.get_device_properties(index)
    return {
        **machine.describe(),
        "gpu": about.name,
        "gpu_memory_bytes": about.total_memory,
        "compute_capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
    }


def meter() -> energy.Meter:
    """The board's energy counter."""
    return energy.gpu()


def pick_cores(threads: int) -> list[int]:
    """The host's part of a query runs on as many cores as for any other artifact."""
    return local.pick_cores(threads)


class Worker(local.Worker):
    """A process with one tower on the GPU."""

    def __init__(self, artifact: Artifact, cores: list[int], timeout_seconds: float) -> None:
        super().__init__(artifact, cores, timeout_seconds, GpuTower)


class GpuTower(local.Tower):
    """Inside the worker: the same as on the CPU, with the GPU's clock."""

    device = "cuda"

    def _one(self) -> tuple[float, float]:
        import torch

        query = self._inputs[self._next]
        self._next = (self._next + 1) % len(self._inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        processor, start = time.process_time_ns(), time.perf_counter_ns()
        begin.record()
        found = self._call(query)
        end.record()
        torch.cuda.synchronize()
        wall = (time.perf_counter_ns() - start) / 1e6
        on_gpu = getattr(found, "is_cuda", False)
        spent = (time.process_time_ns() - processor) / 1e6
        return (begin.elapsed_time(end) if on_gpu else wall), spent
