"""ExecuTorch for phones and small devices: XNNPACK in float32, or in int8 through torchao's PT2E.

What XNNPACK cannot run falls back to portable kernels, each time with a copy in and out: towers
are therefore rewritten until nearly everything is delegated, and the bundle says how much is. Core
ML and QNN take over where they are asked for and can run.
"""

import importlib.util
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from compress.clip import Clip
from compress.twin import float_twin
from export import (
    Unavailable,
    _aten,
    _batches,
    _bundle,
    _calibration,
    _decomposed,
    _delegates,
    _xnnpack,
)
from export import onnx as portable

VERSION = 1
REQUIRES = "executorch"
HONOURS_SCHEME = True

MIN_COSINE = {"fp32": 0.9999, "int8": 0.98, "int8-static": 0.9}
MIN_COSINE_HALF = 0.999


class Config(BaseModel):
    """Settings of the ExecuTorch programs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Literal["fp32", "int8", "int8-static"] = "fp32"
    """fp32. int8: linear layers with 8-bit weights, one scale per column, and activations quantized
    as they come; of a model with a scheme, its foldings and weights. int8-static: with fixed ranges
    of outputs too, for devices without dynamic kernels."""
    backend: _delegates.Backend = "xnnpack"
    """Who runs the towers. xnnpack: CPUs. coreml: Apple's chips. qnn: the NPU of a Snapdragon. The
    last two compute in half precision, take precision fp32 alone and need their SDK."""
    soc: str = "SM8650"
    """qnn: the Snapdragon's model, as Qualcomm numbers it."""
    calibration: int = Field(default=128, ge=1)
    """int8-static: number of training pairs that the ranges come from."""
    batch: int = Field(default=1, ge=1)
    """Images or texts per call, fixed in the program."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.9999 for fp32 (0.999 where a backend
    computes in half precision), 0.98 for int8, 0.9 for int8-static."""

    @model_validator(mode="after")
    def _one_precision(self) -> "Config":
        if self.backend != "xnnpack" and self.precision != "fp32":
            raise ValueError(f"backend {self.backend} takes precision fp32, not {self.precision}")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the result depends on the training data."""
        return self.precision == "int8-static"


class PteEncoder:
    """Both towers in ExecuTorch's runtime.

    Shapes: B any number of inputs, run in calls of the program's own batch; E embedding.
    """

    def __init__(self, folder: Path) -> None:
        self.image, self.text = _method(folder / "image.pte"), _method(folder / "text.pte")

    def bind(self, tower: str) -> "_Bound":
        """One tower with its input ready."""
        return _Bound(getattr(self, tower))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return _run(self.image, pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return _run(self.text, tokens.int().numpy(force=True))


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Export both towers as a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model, Unavailable where the backend
    cannot run; nothing is left at `out` then.
    """
    _require()
    _delegates.require(cfg.backend)
    schemed = cfg.precision == "int8" and clip.model.config.scheme is not None
    clip = clip if schemed else float_twin(clip)
    samples = _calibration.collect(clip, cfg.calibration) if cfg.calibrates else None
    runtime: dict[str, Any] = {
        "backend": cfg.backend,
        "proved_with": {"executorch": metadata.version("executorch"), "cpu": platform.machine()},
    }
    notes: dict[str, str] = {}
    if samples:
        runtime["calibration"] = samples.record()
    if schemed:
        runtime["not_as_the_scheme_says"] = notes
    with _bundle.writing(clip, out, spec(cfg, runtime)) as folder:
        for tower in _bundle.TOWERS:
            if schemed:
                program, unlike = realised(clip, tower, cfg.batch)
                notes |= unlike
            else:
                program = trace(clip, tower, cfg, samples)
            content, runtime[tower] = lower(program, cfg.backend, cfg.soc)
            (folder / f"{tower}.pte").write_bytes(content)
        del program, content  # not held while the files are checked


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> PteEncoder:
    """Open a bundle; `threads` sets XNNPACK's pool, which all programs of this process share.

    None leaves the pool as it is: as many threads as the machine has cores.
    """
    _require()
    if device != "cpu":
        raise Unavailable(f"the installed ExecuTorch runs on the CPU, not on {device}")
    if threads is not None:
        set_threads(threads)
    return PteEncoder(Path(folder))


def spec(cfg: Config, runtime: dict[str, Any]) -> _bundle.Spec:
    """What the bundle's pages say of this target; `runtime` may grow until it is written."""
    usual = MIN_COSINE[cfg.precision] if cfg.backend == "xnnpack" else MIN_COSINE_HALF
    gate = usual if cfg.min_cosine is None else cfg.min_cosine
    return _bundle.Spec(
        "executorch",
        cfg.precision,
        "pte",
        cfg.batch,
        gate,
        load,
        USAGE,
        runtime,
        requirements="executorch torch",
    )


def trace(
    clip: Clip, tower: str, cfg: Config, samples: _calibration.Calibration | None
) -> torch.export.ExportedProgram:
    """One tower as a program of its backend's operators, quantized as `cfg.precision` says."""
    module = portable.unit(clip, tower)
    module = _xnnpack.write_out_(module) if cfg.backend == "xnnpack" else module
    example = portable.example(clip, tower, cfg.batch)
    program = computed(_aten.graph(module, example, _aten.PORTABLE))
    if cfg.precision == "fp32":
        return program
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = cfg.precision == "int8"
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    quantizer = XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, config)
    quantizer.set_filter_function(_xnnpack.outside_norms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(program.module(), quantizer)
        rows = samples.rows(tower) if samples else [example[:1].numpy()]
        with torch.no_grad():
            for place, row in enumerate(rows):
                prepared(torch.from_numpy(np.repeat(row, cfg.batch, axis=0)))
                if place == 0:
                    _keep_ranges_of_weights_(prepared)
        return torch.export.export(convert_pt2e(prepared), (example,))


def _keep_ranges_of_weights_(prepared: torch.fx.GraphModule) -> None:
    """Weights stay as they are from row to row: observing them each time took a third of it all."""
    for node in prepared.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(source, torch.fx.Node) and source.op == "get_attr":
            observer = prepared.get_submodule(node.target)
            observer.forward = nn.Identity().forward


def realised(
    clip: Clip, tower: str, batch: int
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """One tower with its scheme's weights in XNNPACK's dynamic kernels, and what differs.

    XNNPACK's kernels with fixed ranges round their outputs to 8 bits too, which no scheme asks for;
    the dynamic ones give floats.
    """
    module, notes = _decomposed.realise(clip, tower, dynamic=True)
    unit = _xnnpack.write_out_(portable.Unit(module).eval())
    return computed(_aten.graph(unit, portable.example(clip, tower, batch), _aten.PORTABLE)), notes


def computed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with what follows from weights alone computed once, but for integer weights.

    Token reduction takes its queries and keys from slices of weights; left in the graph, XNNPACK's
    partitions become cyclic or crash when they run. Each gets memory of its own: XNNPACK writes a
    slice from where the memory of its whole begins.
    """
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    ops = torch.ops.quantized_decomposed
    integers = {
        ops.quantize_per_channel.default,
        ops.dequantize_per_channel.default,
        ops.dequantize_per_channel_group.default,
    }
    program = constant_prop_pass(program, custom_skip_targets=integers)
    for name, value in program.constants.items():
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.nbytes:
            program.constants[name] = value.clone()
    return program


def lower(
    program: torch.export.ExportedProgram,
    backend: _delegates.Backend = "xnnpack",
    soc: str = Config().soc,
) -> tuple[bytes, dict[str, Any]]:
    """A program -> the bytes of a .pte file, and how much of it the backend runs.

    `delegates`: pieces that the backend runs; `delegated_share`: their part of all operators.
    """
    from executorch.devtools.backend_debug import get_delegation_info

    edge = _delegates.lower(program, backend, soc)
    info = get_delegation_info(edge.exported_program().graph_module)
    inside, outside = info.num_delegated_nodes, info.num_non_delegated_nodes
    about = {
        "delegates": info.num_delegated_subgraphs,
        "delegated_share": round(inside / (inside + outside), 4),
    }
    return bytes(edge.to_executorch().buffer), about


def set_threads(threads: int) -> None:
    """Set XNNPACK's thread pool and read it back; raises Unavailable where it did not take."""
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    found = portable_lib._threadpool_get_thread_count()
    if found != threads:
        raise Unavailable(f"ExecuTorch's thread pool has {found} threads, {threads} were asked for")


def _method(path: Path) -> Any:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    try:
        return program.load_method("forward")
    except RuntimeError as error:  # says what it lacks: a backend, an operator
        raise Unavailable(f"this ExecuTorch cannot run {path.name}: {error}") from error


class _Bound:
    """A method with its input ready: a query is its `execute` alone."""

    def __init__(self, method: Any) -> None:
        self._method, self._given, self._found = method, (torch.empty(0),), (torch.empty(0),)

    def fill(self, rows: Tensor) -> None:
        """rows [B, ...] of the program's own batch."""
        self._given = (rows.float() if rows.is_floating_point() else rows.int(),)

    def run(self) -> None:
        self._found = self._method.execute(self._given)

    def embedding(self) -> np.ndarray:
        """[B, E]."""
        return self._found[0].numpy().copy()


def _run(method: Any, rows: np.ndarray) -> Tensor:
    """rows [B, ...] -> [B, E]."""
    batch = method.metadata.input_tensor_meta(0).sizes()[0]
    call = lambda part: method.execute((torch.from_numpy(part),))[0].numpy()  # noqa: E731
    return _batches.run(call, rows, batch)


def _require() -> None:
    for name in ("executorch", "torchao"):
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"{name} is not installed: pip install 'pocketclip[executorch]'")


USAGE = '''\
import torch
from executorch.runtime import Runtime


def open_tower(tower):
    """A function from one input array to its embedding."""
    entry = bundle[tower]
    method = Runtime.get().load_program(entry["file"]).load_method("forward")

    def run(array):
        feed = np.repeat(array[None], entry["input"]["shape"][0], axis=0)
        return method.execute((torch.from_numpy(feed),))[0][0].numpy().copy()

    return run
'''
