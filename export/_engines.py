"""TensorRT engines: built from a graph, kept for this user, run on the GPU.

An engine is native code for one version and one kind of GPU: it never comes from outside.
"""

import hashlib
import importlib
import importlib.util
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress import atomic
from compress.errors import GateFailed
from export import Unavailable, _batches

# Modules by their packages; the first that is installed is used.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
CACHE = Path(".cache") / "pocketclip" / "engines"


def module() -> Any:
    """The TensorRT that is installed here; Unavailable without one."""
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise Unavailable("TensorRT is not installed: pip install 'pocketclip[tensorrt]'")


def build(path: Path, capability: str | None) -> bytes:
    """A graph -> an engine for `capability` (SM89); None is the GPU that is here.

    Raises GateFailed with TensorRT's words where it refuses the graph, Unavailable for a kind of
    GPU that it doesn't know.
    """
    trt = module()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise GateFailed(f"TensorRT cannot parse {path.name}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    aim(trt, config, capability)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise GateFailed(f"TensorRT cannot build {path.name}: {'; '.join(logger.said[-2:])}")
    return bytes(plan)


def aim(trt: Any, config: Any, capability: str | None) -> None:
    """Build for `capability`; None: for the GPU that is here.

    tensorrt-rtx must be told that too: what it builds by default leaves Turing out. `tensorrt` has
    no choice. Raises Unavailable for a kind of GPU that the package doesn't know.
    """
    kinds = getattr(trt, "ComputeCapability", None)
    if kinds is None and capability is None:
        return
    kind = getattr(kinds, capability or "CURRENT", None)
    if kind is None:
        raise Unavailable(f"{trt.__name__} {trt.__version__} doesn't build for {capability}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(kind, 0)


def engine(path: Path) -> bytes:
    """The engine of a graph for the GPU that is here: from this user's cache, or built into it.

    The key is package and version, GPU, driver and the graph's hash. A cache that others may write
    to is refused: an engine is native code.
    """
    trt = module()
    key = [trt.__name__, trt.__version__, torch.cuda.get_device_name(0), torch.version.cuda or ""]
    key += [str(torch.cuda.get_device_capability(0)), atomic.sha256(path), "for this GPU"]
    folder = private(Path.home() / CACHE)
    cached = folder / f"{hashlib.sha256('|'.join(key).encode()).hexdigest()}.engine"
    if not cached.is_file():
        atomic.write_bytes(cached, build(path, None))
    return cached.read_bytes()


def private(folder: Path) -> Path:
    """A folder that only this user can write to; Unavailable where others can."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.lstat()
    open_to_others = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if folder.is_symlink() or about.st_uid != _user(folder) or open_to_others:
        raise Unavailable(f"{folder}: others can write engines here, which run as native code")
    return folder


class Engine:
    """One tower on the GPU."""

    def __init__(self, path: Path) -> None:
        trt = module()
        logger = _logger(trt)
        self.engine = trt.Runtime(logger).deserialize_cuda_engine(engine(path))
        if self.engine is None:
            gpu = torch.cuda.get_device_name(0)
            said = "; ".join(logger.said[-2:]) or "it does not say why"
            raise Unavailable(
                f"{path.name}: {trt.__name__} {trt.__version__} refuses its own engine on {gpu}: "
                f"{said} (tensorrt-rtx is for RTX GPUs; data centre GPUs need tensorrt)"
            )
        self.context = self.engine.create_execution_context()
        self.source, self.target = (self.engine.get_tensor_name(i) for i in range(2))
        shape = tuple(self.engine.get_tensor_shape(self.target))
        self.output = torch.empty(shape, device="cuda")
        self.context.set_tensor_address(self.target, self.output.data_ptr())

    def run(self, rows: np.ndarray) -> Tensor:
        """rows [B, ...] -> [B, E]."""
        return _batches.run(self._call, rows, self.output.shape[0])

    def _call(self, rows: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(np.ascontiguousarray(rows)).cuda()
        self.context.set_tensor_address(self.source, inputs.data_ptr())
        stream = torch.cuda.current_stream()
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise Unavailable(f"TensorRT cannot run {self.source} on this GPU")
        stream.synchronize()
        return self.output.numpy(force=True)


def _logger(trt: Any) -> Any:
    """Keeps errors for the message that reports them, and prints nothing."""

    class Quiet(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.said.append(message)

    return Quiet()


def _user(folder: Path) -> int:
    """Who runs this; on systems without user ids, who owns the folder."""
    import os

    return os.getuid() if hasattr(os, "getuid") else folder.lstat().st_uid
