"""LiteRT (TensorFlow Lite) for Android: float32, or 8-bit integers with dynamic or fixed ranges.

Ids stay int32 and the end of a text is found with whole-number arithmetic and a mask, as LiteRT's
converter has no 64-bit argmax that its delegates can run.
"""

import importlib.util
import logging
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.clip import Clip
from compress.twin import float_twin
from export import Unavailable, _aten, _batches, _bundle, _calibration, _decomposed
from export import onnx as portable

VERSION = 1
REQUIRES = "litert"
HONOURS_SCHEME = True

MIN_COSINE = {"fp32": 0.9999, "int8": 0.98, "int8-static": 0.9}
# Scores, norms and the normalisation lose too much in 8 bits: the text tower falls to nothing.
STATIC = ("FULLY_CONNECTED", "CONV_2D")


class Config(BaseModel):
    """Settings of the LiteRT files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Literal["fp32", "int8", "int8-static"] = "fp32"
    """fp32. int8: 8-bit weights and token table, activations quantized as they come: the fast one
    on CPUs. int8-static: fixed ranges around matrices and convolutions, as NPUs need; of a model
    with a scheme, the scheme's own."""
    calibration: int = Field(default=128, ge=1)
    """int8-static: number of training pairs that the ranges come from."""
    batch: int = Field(default=1, ge=1)
    """Images or texts per call, fixed in the graph."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.9999 for fp32, 0.98 for int8, 0.9 for
    int8-static."""

    @property
    def calibrates(self) -> bool:
        """Whether the result depends on the training data."""
        return self.precision == "int8-static"


class LiteRtEncoder:
    """Both towers in LiteRT's interpreter on the CPU.

    Shapes: B any number of inputs, run in calls of the graph's own batch; E embedding.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.image = _interpreter(folder / "image.tflite", threads)
        self.text = _interpreter(folder / "text.tflite", threads)

    def bind(self, tower: str) -> "_Bound":
        """One tower with its tensors in the interpreter."""
        return _Bound(getattr(self, tower))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return _run(self.image, pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return _run(self.text, tokens.int().numpy(force=True))


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Export both towers as a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model; nothing is left at `out` then.
    """
    _require("litert_torch")
    schemed = cfg.precision == "int8-static" and clip.model.config.scheme is not None
    clip = clip if schemed else float_twin(clip)
    wanted = cfg.calibrates and not schemed
    samples = _calibration.collect(clip, cfg.calibration) if wanted else None
    about = spec(cfg, samples)
    notes: dict[str, str] = {}
    with _bundle.writing(clip, out, about) as folder:
        for tower in _bundle.TOWERS:
            path, example = folder / f"{tower}.tflite", portable.example(clip, tower, cfg.batch)
            if schemed:
                module, unlike = _decomposed.realise(clip, tower, folded=False)
                convert(
                    portable.Unit(module).eval(), portable.example(clip, tower, cfg.batch), path
                )
                notes |= unlike
                about.runtime["not_as_the_scheme_says"] = notes
                continue
            convert(portable.unit(clip, tower), example, path)
            if cfg.precision != "fp32":
                rows = samples.rows(tower) if samples else None
                path.write_bytes(quantize(path.read_bytes(), cfg.batch, rows))


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> LiteRtEncoder:
    """Open a bundle in LiteRT on the CPU; `threads` None leaves the choice to it."""
    _require("ai_edge_litert")
    if device != "cpu":
        raise Unavailable(f"LiteRT's Python runtime runs on the CPU, not on {device}")
    return LiteRtEncoder(Path(folder), threads)


def spec(cfg: Config, samples: _calibration.Calibration | None = None) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    gate = MIN_COSINE[cfg.precision] if cfg.min_cosine is None else cfg.min_cosine
    versions = {"ai-edge-litert": metadata.version("ai-edge-litert"), "cpu": platform.machine()}
    runtime: dict[str, Any] = {"proved_with": versions}
    if samples:
        runtime["calibration"] = samples.record()
    return _bundle.Spec(
        "litert",
        cfg.precision,
        "tflite",
        cfg.batch,
        gate,
        load,
        USAGE,
        runtime,
        requirements="ai-edge-litert",
    )


def convert(module: nn.Module, example: Tensor, path: Path) -> None:
    """Write one normalised tower as a .tflite file."""
    import litert_torch

    program = _aten.graph(module, example, _aten.PORTABLE)
    logging.getLogger("litert_torch").setLevel(logging.ERROR)
    litert_torch.convert(program.module(), (example,)).export(str(path))


def quantize(content: bytes, batch: int, rows: list[np.ndarray] | None) -> bytes:
    """A float32 .tflite -> one with 8-bit weights; with inputs to look at, fixed ranges too."""
    from ai_edge_quantizer import qtyping, quantizer, recipe

    if rows is None:
        found = quantizer.Quantizer(content, recipe.dynamic_wi8_afp32()).quantize()
        return bytes(found.quantized_model or b"")
    work = quantizer.Quantizer(content)
    for name in STATIC:
        operation = qtyping.TFLOperationName[name]
        work.add_static_config(".*", operation, activation_num_bits=8, weight_num_bits=8)
    name = next(iter(_interpreter_of(content).get_signature_list().values()))["inputs"][0]
    inputs = [{name: np.repeat(row, batch, axis=0)} for row in rows]
    ranges = work.calibrate({"serving_default": inputs}, num_threads=1)
    return bytes(work.quantize(ranges).quantized_model or b"")


def _interpreter(path: Path, threads: int | None) -> Any:
    return _interpreter_of(path.read_bytes(), threads)


def _interpreter_of(content: bytes, threads: int | None = None) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    return interpreter


class _Bound:
    """An interpreter whose tensors are known: a query is its `invoke` alone."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        [given], [found] = interpreter.get_input_details(), interpreter.get_output_details()
        self._given, self._found, self._dtype = given["index"], found["index"], given["dtype"]

    def fill(self, rows: Tensor) -> None:
        """rows [B, ...] of the file's own batch."""
        self._interpreter.set_tensor(self._given, rows.numpy(force=True).astype(self._dtype))

    def run(self) -> None:
        self._interpreter.invoke()

    def embedding(self) -> np.ndarray:
        """[B, E]."""
        found: np.ndarray = self._interpreter.get_tensor(self._found)
        return found


def _run(interpreter: Any, rows: np.ndarray) -> Tensor:
    """rows [B, ...] -> [B, E]."""
    [given], [found] = interpreter.get_input_details(), interpreter.get_output_details()

    def call(part: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], part)
        interpreter.invoke()
        result: np.ndarray = interpreter.get_tensor(found["index"])
        return result

    return _batches.run(call, rows, int(given["shape"][0]))


def _require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        where = "" if sys.platform == "linux" else "; it converts on Linux only"
        raise Unavailable(f"{name} is not installed: pip install 'pocketclip[litert]'{where}")


USAGE = '''\
from ai_edge_litert.interpreter import Interpreter


def open_tower(tower):
    """A function from one input array to its embedding."""
    entry = bundle[tower]
    interpreter = Interpreter(entry["file"])
    interpreter.allocate_tensors()
    given, found = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(array):
        feed = np.repeat(array[None], entry["input"]["shape"][0], axis=0)
        interpreter.set_tensor(given["index"], feed)
        interpreter.invoke()
        return interpreter.get_tensor(found["index"])[0]

    return run
'''
