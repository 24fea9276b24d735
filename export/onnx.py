"""Portable ONNX: standard operators only, static shapes, weights inside the file."""

import platform
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.clip import Clip
from compress.twin import float_twin
from export import Unavailable, _batches, _bundle, _layers, _proto

VERSION = 1
REQUIRES = ""
FILES = {"image": "image.onnx", "text": "text.onnx"}


class Config(BaseModel):
    """Settings of the portable graph."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch: int = Field(default=1, ge=1)
    """Images or texts per call, fixed in the graph; 1 is fastest on phones."""
    opset: int = Field(default=20, ge=20, le=23)
    """ONNX operator set; 20 is the first with Gelu, 23 needs runtimes of 2025 or later."""
    min_cosine: float = Field(default=0.9999, ge=-1, le=1)
    """Parity gate: the worst cosine to the torch model that either tower may show."""


class Unit(nn.Module):
    """A tower with its L2 normalisation, as one graph."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.tower(x), dim=-1)


class _Wide(nn.Module):
    """A unit that takes 64-bit ids, which tokenizers in JavaScript give."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x if x.is_floating_point() else x.to(torch.int32))


class OrtEncoder:
    """Both towers of an ONNX bundle in ONNX Runtime.

    Shapes: B any number of inputs, run in calls of the graph's own batch; E embedding.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        threads: int | None,
        files: Mapping[str, str | bytes] = FILES,
    ) -> None:
        """files: the name of each tower's file, or what stands in it."""
        sources = {t: f if isinstance(f, bytes) else folder / f for t, f in files.items()}
        self.image = _session(sources["image"], device, threads)
        self.text = _session(sources["text"], device, threads)
        self._image, self._text = _Graph(self.image), _Graph(self.text)

    def bind(self, tower: str) -> "_Bound":
        """One tower with its tensors bound to the session."""
        return _Bound(getattr(self, f"_{tower}"))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return self._image(pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return self._text(tokens.to(self._text.integers).numpy(force=True))


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Export both towers as a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model; nothing is left at `out` then.
    """
    with _bundle.writing(clip, out, spec(cfg)) as folder:
        for tower in _bundle.TOWERS:
            save(graph(clip, tower, cfg.batch, cfg.opset), folder / f"{tower}.onnx")


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> OrtEncoder:
    """Open a bundle's .onnx files in ONNX Runtime; `threads` None leaves the choice to it."""
    return OrtEncoder(Path(folder), device, threads)


def spec(cfg: Config) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    return _bundle.Spec(
        "onnx",
        "fp32",
        "onnx",
        cfg.batch,
        cfg.min_cosine,
        load,
        USAGE,
        runtime(cfg),
        diagnose=partial(diagnose, batch=cfg.batch, min_cosine=cfg.min_cosine),
    )


def diagnose(
    clip: Clip, folder: Path, tower: str, row: Tensor, batch: int, min_cosine: float
) -> str:
    """Where the file of a tower leaves the torch model, for the message of a failed gate."""
    import onnx

    plain = graph(clip, tower, batch, Config().opset)
    if not _proto.fits_one_message(plain):
        return "; its layers are too large to compare"
    changed = onnx.load(folder / f"{tower}.onnx")
    module = unit(clip, tower)
    rows = row.repeat(batch, *[1] * (row.dim() - 1))
    return _layers.first_diverging(module, rows, plain, changed, min_cosine)


def runtime(cfg: Config) -> dict[str, Any]:
    """What the files were written for and proved with."""
    import onnxruntime

    return {
        "opset": cfg.opset,
        "proved_with": {"onnxruntime": onnxruntime.__version__, "cpu": platform.machine()},
    }


def unit(clip: Clip, tower: str) -> nn.Module:
    """One tower with its normalisation, in float32 and evaluation mode (see `_bundle.in_float`).

    Of a model with a scheme it is the float twin: weights on their grid, activations in float.
    """
    twin = float_twin(clip).model
    return Unit(_bundle.in_float(getattr(twin, tower))).eval()


def example(clip: Clip, tower: str, batch: int) -> Tensor:
    """An input of the right shape and type, to trace a tower with."""
    if tower == "image":
        return torch.zeros(batch, 3, *clip.preprocess.size)
    return torch.zeros(batch, clip.tokenizer.contract.context_length, dtype=torch.int32)


def graph(clip: Clip, tower: str, batch: int, opset: int) -> Any:
    """One tower, normalised, as an onnx.ModelProto with static shapes and checked structure."""
    return _exported(unit(clip, tower), tower, example(clip, tower, batch), opset, None)


def open_graph(clip: Clip, tower: str, opset: int) -> Any:
    """The same with int64 ids and a free number of inputs, `batch`.

    A text tower that sees no padding takes texts of any `length`; another its whole context.
    """
    inputs = example(clip, tower, 2)
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if tower == "text":
        inputs = inputs.long()
        if any_length(clip):
            free[1] = torch.export.Dim("length", min=2, max=inputs.shape[1])
    return _exported(_Wide(unit(clip, tower)).eval(), tower, inputs, opset, (free,))


def any_length(clip: Clip) -> bool:
    """Whether a text may be cut after its end mark, or has to fill the context."""
    return bool(getattr(clip.model.config.text, "sees_no_padding", False))


def _exported(module: nn.Module, tower: str, inputs: Tensor, opset: int, free: Any) -> Any:
    program = torch.onnx.export(
        module,
        (inputs,),
        dynamo=True,
        opset_version=opset,
        input_names=[_bundle.INPUTS[tower]],
        output_names=[_bundle.OUTPUTS[tower]],
        dynamic_shapes=free,
        optimize=True,
        verbose=False,
    )
    assert program is not None
    return _proto.finished(program, tower)


def save(model: Any, path: Path) -> None:
    """Write the graph; weights too large for one message go to `<name>.data` beside it."""
    import onnx

    if _proto.fits_one_message(model):
        onnx.save_model(model, path)
    else:
        location = f"{path.name}.data"
        onnx.save_model(model, path, save_as_external_data=True, location=location)


def rename_(model: Any, names: Mapping[str, str]) -> None:
    """Give inputs and outputs of the graph other names, in place."""
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _session(source: Path | bytes, device: str, threads: int | None) -> Any:
    import onnxruntime

    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = providers.get(device)
    if provider not in onnxruntime.get_available_providers():
        raise Unavailable(f"this onnxruntime has no {device} provider")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    given = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(given, options, providers=[provider])


class _Graph:
    """A session and what it takes, asked for once: asking costs a twentieth of a small query."""

    def __init__(self, session: Any) -> None:
        spec = session.get_inputs()[0]
        self.session, self.name = session, spec.name
        self.batch = spec.shape[0] if isinstance(spec.shape[0], int) else 1
        self.integers = torch.int64 if "int64" in spec.type else torch.int32

    def __call__(self, rows: np.ndarray) -> Tensor:
        """rows [B, ...] -> [B, E]."""
        return _batches.run(self._once, rows, self.batch)

    def _once(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.session.run(None, {self.name: rows})[0]
        return found


class _Bound:
    """A session with its input and output bound once: a query is its run alone."""

    def __init__(self, graph: _Graph) -> None:
        self._graph, self._binding = graph, graph.session.io_binding()
        self._binding.bind_output(graph.session.get_outputs()[0].name)

    def fill(self, rows: Tensor) -> None:
        """rows [B, ...] of the file's own batch."""
        rows = rows.float() if rows.is_floating_point() else rows.to(self._graph.integers)
        self._rows = rows.numpy(force=True)  # the binding reads it where it lies
        self._binding.bind_cpu_input(self._graph.name, self._rows)

    def run(self) -> None:
        self._graph.session.run_with_iobinding(self._binding)

    def embedding(self) -> np.ndarray:
        """[B, E]."""
        return np.array(self._binding.copy_outputs_to_cpu()[0], dtype=np.float32)


USAGE = '''\
import onnxruntime


def open_tower(tower):
    """A function from one input array to its embedding."""
    entry = bundle[tower]
    session = onnxruntime.InferenceSession(entry["file"], providers=["CPUExecutionProvider"])

    def run(array):
        feed = np.repeat(array[None], entry["input"]["shape"][0], axis=0)
        feed = feed.astype(entry["input"]["dtype"])
        return session.run(None, {entry["input"]["name"]: feed})[0][0]

    return run
'''
