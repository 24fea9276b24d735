"""TensorRT for NVIDIA GPUs: a strongly typed graph, from which each GPU builds its own engine.

The bundle ships ONNX, not engines: an engine fits one version and one kind of GPU, and loading it
runs native code. `load` builds what is missing and keeps it in this user's cache. Either package
will do: `tensorrt`, or `tensorrt-rtx`, which also builds where there is no GPU.
"""

import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.clip import Clip
from export import Unavailable, _batches, _bundle, _calibration
from export import onnx as portable
from export._engines import PACKAGES, Engine, build, module

VERSION = 1
REQUIRES = "tensorrt"

MIN_COSINE = {"fp16": 0.999, "int8": 0.9, "fp8": 0.9}


class Config(BaseModel):
    """Settings of the graphs that engines are built from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Literal["fp16", "int8", "fp8"] = "fp16"
    """Types of the graph, which TensorRT keeps. fp16: half precision, layer norms in float32. int8:
    symmetric integers in the matrix products with weights, a scale per column, the rest as fp16;
    measure it, as attention alone often makes fp16 faster. fp8: E4M3 in their place, for GPUs of
    compute capability 8.9 or later."""
    batch: int = Field(default=1, ge=1)
    """Images or texts per call, fixed in the graph: one engine for each batch."""
    capability: str = Field(default="SM89", pattern=r"^SM\d+$")
    """The kind of GPU that the graphs are tried for when they are written, where no GPU is needed
    for it (tensorrt-rtx): SM75, SM80, SM86, SM89, SM120, SM121."""
    calibration: int = Field(default=128, ge=1)
    """int8 and fp8: number of training pairs that the ranges come from."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.999 for fp16, 0.9 for the others."""

    @property
    def calibrates(self) -> bool:
        """Whether the result depends on the training data."""
        return self.precision != "fp16"


class TrtEncoder:
    """Both towers as engines on a GPU.

    Shapes: B any number of inputs, run in calls of the engine's own batch; E embedding.
    """

    def __init__(self, folder: Path) -> None:
        self.image, self.text = (Engine(folder / f"{tower}.onnx") for tower in _bundle.TOWERS)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return self.image.run(pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return self.text.run(tokens.to(torch.int32).numpy(force=True))


class SimulatedEncoder:
    """The same graphs in ONNX Runtime on the CPU, in place of `TrtEncoder`."""

    def __init__(self, folder: Path) -> None:
        self.image, self.text = (_session(folder / f"{tower}.onnx") for tower in _bundle.TOWERS)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return _simulated(self.image, pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return _simulated(self.text, tokens.to(torch.int32).numpy(force=True))


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Write both strongly typed graphs as a whole bundle at `out`.

    Without a GPU they are built ahead of time, to see that TensorRT takes them, and their parity is
    that of the same graphs in ONNX Runtime. Raises GateFailed if they disagree with the torch model
    or TensorRT refuses them, Unavailable without TensorRT.
    """
    module()
    samples = _calibration.collect(clip, cfg.calibration) if cfg.calibrates else None
    runtime: dict[str, Any] = {"calibration": samples.record()} if samples else {}
    with _bundle.writing(clip, out, spec(cfg, runtime)) as folder:
        for tower in _bundle.TOWERS:
            plain = portable.graph(clip, tower, cfg.batch, portable.Config().opset)
            path = folder / f"{tower}.onnx"
            portable.save(typed(plain, tower, cfg, samples), path)
            runtime[tower] = _tried(path, cfg.capability)
        del plain  # not held while the files are checked


def load(folder: Path, device: str = "cuda", threads: int | None = None) -> TrtEncoder:
    """Open a bundle on the first GPU, building its engines if this user's cache lacks them."""
    module()
    if not torch.cuda.is_available():
        raise Unavailable("TensorRT runs on NVIDIA GPUs only, and torch finds none here")
    return TrtEncoder(Path(folder))


def spec(cfg: Config, runtime: dict[str, Any]) -> _bundle.Spec:
    """What the bundle's pages say of this target; `runtime` is filled in while it is written."""
    gate = MIN_COSINE[cfg.precision] if cfg.min_cosine is None else cfg.min_cosine
    package = PACKAGES[module().__name__]
    runtime["opset"] = portable.Config().opset
    runtime["proved_with"] = {package: metadata.version(package), "cpu": platform.machine()}
    return _bundle.Spec(
        "tensorrt",
        cfg.precision,
        "onnx",
        cfg.batch,
        gate,
        load,
        USAGE,
        runtime,
        requirements="tensorrt-rtx torch",
        simulate=SimulatedEncoder,
    )


def typed(plain: Any, tower: str, cfg: Config, samples: _calibration.Calibration | None) -> Any:
    """The portable float32 graph -> the graph with the types that TensorRT shall use."""
    from export import _half, _qdq

    if cfg.precision == "fp16":
        return _half.rewrite(plain)
    assert samples is not None, "int8 and fp8 take their ranges from samples"
    kind = _qdq.INT8 if cfg.precision == "int8" else _qdq.FP8
    rows = [np.repeat(row, cfg.batch, axis=0) for row in samples.rows(tower)]
    return _half.rewrite(_qdq.rewrite(plain, _qdq.ranges(plain, rows), kind))


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Its fusions would move rounding to places where the graph has none.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options)


def _simulated(session: Any, rows: np.ndarray) -> Tensor:
    """rows [B, ...] -> [B, E]."""
    [source] = session.get_inputs()
    call = lambda part: session.run(None, {source.name: part})[0]  # noqa: E731
    return _batches.run(call, rows, source.shape[0])


def _tried(path: Path, capability: str) -> dict[str, Any]:
    """What building one graph ahead of time gave; nothing where only a GPU can build."""
    if not hasattr(module(), "ComputeCapability"):
        return {}
    started = time.perf_counter()
    size = len(build(path, capability))
    seconds = round(time.perf_counter() - started, 2)
    return {"built_for": capability, "engine_bytes": size, "build_seconds": seconds}


USAGE = '''\
import tensorrt_rtx as trt  # or: import tensorrt as trt
import torch

logger = trt.Logger(trt.Logger.ERROR)


def open_tower(tower):
    """A function from one input array to its embedding; builds the engine for this GPU."""
    entry, builder = bundle[tower], trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    trt.OnnxParser(network, logger).parse_from_file(entry["file"])
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    output = torch.empty(entry["output"]["shape"], device="cuda")
    context.set_tensor_address(entry["output"]["name"], output.data_ptr())

    def run(array):
        feed = np.repeat(array[None], entry["input"]["shape"][0], axis=0)
        feed = torch.from_numpy(feed).cuda()
        context.set_tensor_address(entry["input"]["name"], feed.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        return output[0].cpu().numpy()

    return run
'''
