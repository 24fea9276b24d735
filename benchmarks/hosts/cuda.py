"""An NVIDIA GPU of this machine: exporters' `load` with device cuda, timed by CUDA events.

`cuda` or `cuda:INDEX`; `cuda:graph` replays each query as a CUDA graph, captured once, which leaves
out what launching its kernels one by one costs.

Of a torch model, whose inputs lie on the GPU beforehand, the events bracket the query alone,
launches included; runtimes that take arrays from the host (ONNX Runtime, TensorRT through its
exporter) are timed with their copies, the stream synchronised before the clock stops.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks import energy, machine
from benchmarks.hosts import local
from benchmarks.timing import Artifact
from compress.errors import PocketclipError
from export import Unavailable


def describe(place: str = "") -> dict[str, Any]:
    """The GPU. Raises Unavailable where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device, or a torch without CUDA")
    index, graph = parsed(place)
    about = torch.cuda.get_device_properties(index)
    return {
        **machine.describe(),
        "gpu": about.name,
        "gpu_memory_bytes": about.total_memory,
        "compute_capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "graph": graph,
    }


def parsed(place: str) -> tuple[int, bool]:
    """`1:graph` -> GPU 1, as a graph. Raises PocketclipError for anything else."""
    words = [word for word in place.split(":") if word]
    numbers = [word for word in words if word.isdecimal()]
    if len(numbers) > 1 or any(word not in (*numbers, "graph") for word in words):
        raise PocketclipError(f"host cuda:{place}: there is cuda, cuda:INDEX and cuda:graph")
    return int(numbers[0]) if numbers else 0, "graph" in words


def meter() -> energy.Meter:
    """The board's energy counter."""
    return energy.gpu()


def pick_cores(threads: int) -> list[int]:
    """The host's part of a query runs on as many cores as for any other artifact."""
    return local.pick_cores(threads)


class Worker(local.Worker):
    """A process with one tower on the GPU."""

    def __init__(self, artifact: Artifact, cores: list[int], timeout_seconds: float) -> None:
        _, graph = parsed(artifact.host.partition(":")[2])
        super().__init__(artifact, cores, timeout_seconds, GraphTower if graph else GpuTower)


class GpuTower(local.Tower):
    """Inside the worker: the same as on the CPU, with the GPU's clock."""

    device = "cuda"

    def _one(self, query: Any) -> float:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        begin.record()
        found = self._call(query)
        end.record()
        torch.cuda.synchronize()
        wall = (time.perf_counter_ns() - start) / 1e6
        return begin.elapsed_time(end) if getattr(found, "is_cuda", False) else wall


class GraphTower(GpuTower):
    """The same query, captured as a CUDA graph at load: a copy of the input and one launch."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self._call = captured(self._call, self._inputs[0])


def captured(call: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """`call` for inputs of the example's shape, as a graph after torch's recipe.

    Raises Unavailable for queries that are not tensors on a GPU: other runtimes, raw pictures.
    """
    import torch

    if not getattr(example, "is_cuda", False):
        raise Unavailable("CUDA graphs are captured of torch models alone, scope model")
    given = example.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels before the capture
            call(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(given)

    def replay(query: Any) -> Any:
        given.copy_(query)
        graph.replay()
        return found

    return replay
