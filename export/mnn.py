"""MNN for phones: from the portable graph, weights in float32 or in 8 or 4 bits."""

import importlib.util
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.clip import Clip
from export import Unavailable, _batches, _bundle
from export import onnx as portable

VERSION = 2
REQUIRES = "mnn"

MIN_COSINE = {"fp32": 0.9999, "w8": 0.999, "w4": 0.7}
# One scale per output column in 8 bits; 4 bits need one per 32 weights of a column.
QUANTIZATION = {
    "fp32": [],
    "w8": ["--weightQuantBits", "8", "--weightQuantAsymmetric"],
    "w4": ["--weightQuantBits", "4", "--weightQuantAsymmetric", "--weightQuantBlock", "32"],
}
# The package's own `mnnconvert` command reports each conversion to a server; its function doesn't.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


class Config(BaseModel):
    """Settings of the MNN files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Literal["fp32", "w8", "w4"] = "fp32"
    """fp32; w8 and w4: matrices and patch projection in 8 bits (a scale per column) or 4 bits (a
    scale per 32 weights), the token table and the arithmetic in float."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.9999 for fp32, 0.999 for w8, 0.7 for
    w4, which only catches what is broken: 4 bits cost a narrow model much, a wide one little."""


class MnnEncoder:
    """Both towers of a bundle in MNN, one input a call.

    Shapes: B any number of inputs, E embedding.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.image = _module(folder, "image", threads or 1)
        self.text = _module(folder, "text", threads or 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return _run(self.image, pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return _run(self.text, tokens.to(torch.int32).numpy(force=True))


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Convert both towers into a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model, Unavailable without MNN or where
    it lacks an operator of this model.
    """
    _require()
    with _bundle.writing(clip, out, spec(cfg)) as folder:
        for tower in _bundle.TOWERS:
            graph = folder / f"{tower}.onnx"
            model = portable.graph(clip, tower, 1, portable.Config().opset)
            spell_out_lengths_(model)
            portable.save(model, graph)
            convert(graph, folder / f"{tower}.mnn", QUANTIZATION[cfg.precision])
            for part in folder.glob(f"{graph.name}*"):
                part.unlink()
        del model  # not held while the files are checked


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> MnnEncoder:
    """Open a bundle in MNN on the CPU; `threads` None means one."""
    _require()
    if device != "cpu":
        raise Unavailable(f"the installed MNN runs on the CPU, not on {device}")
    return MnnEncoder(Path(folder), threads)


def spec(cfg: Config) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    gate = MIN_COSINE[cfg.precision] if cfg.min_cosine is None else cfg.min_cosine
    runtime = {"proved_with": {"mnn": metadata.version("MNN"), "cpu": platform.machine()}}
    return _bundle.Spec(
        "mnn", cfg.precision, "mnn", 1, gate, load, USAGE, runtime, requirements="MNN"
    )


def spell_out_lengths_(model: Any) -> None:
    """Replace ReduceL2 by the root of a sum of squares, in place.

    MNN overlooks the axes that ReduceL2 takes as an input and reduces all: the same for one
    embedding, another thing for the rows that token reduction compares.
    """
    from onnx import helper

    nodes = []
    for node in model.graph.node:
        if node.op_type != "ReduceL2":
            nodes.append(type(node).FromString(node.SerializeToString()))
            continue
        x, length = node.input[0], node.output[0]
        square, total = f"{length}_square", f"{length}_sum"
        summed = helper.make_node("ReduceSum", [square, *node.input[1:]], [total])
        summed.attribute.extend(node.attribute)
        nodes += [
            helper.make_node("Mul", [x, x], [square]),
            summed,
            helper.make_node("Sqrt", [total], [length]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def convert(graph: Path, path: Path, options: list[str]) -> None:
    """An .onnx file -> an .mnn file, in a process of its own, as the converter prints and exits.

    Raises Unavailable with the converter's last words where it fails.
    """
    command = [sys.executable, "-c", CONVERT, "-f", "ONNX", "--modelFile", str(graph)]
    command += ["--MNNModel", str(path), "--bizCode", "pocketclip", "--keepInputFormat", *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not path.is_file():
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise Unavailable(f"MNN cannot convert the {graph.stem} tower: {' / '.join(said)}")


def _require() -> None:
    if importlib.util.find_spec("MNN") is None:
        raise Unavailable("MNN is not installed: pip install 'pocketclip[mnn]'")


def _module(folder: Path, tower: str, threads: int) -> Any:
    import MNN

    # Precision "normal" is float32 on CPUs; "low" would compute in half precision where it can.
    settings = {"backend": "CPU", "precision": "normal", "numThread": threads}
    manager = MNN.nn.create_runtime_manager((settings,))
    names = [_bundle.INPUTS[tower]], [_bundle.OUTPUTS[tower]]
    path = str(folder / f"{tower}.mnn")
    return MNN.nn.load_module_from_file(path, *names, runtime_manager=manager)


def _run(module: Any, rows: np.ndarray) -> Tensor:
    """rows [B, ...] -> [B, E]."""
    from MNN import expr

    kind = expr.int if rows.dtype == np.int32 else expr.float

    def call(row: np.ndarray) -> np.ndarray:
        row = np.ascontiguousarray(row)
        [found] = module.onForward([expr.const(row, list(row.shape), expr.NCHW, kind)])
        return np.array(expr.convert(found, expr.NCHW).read()).reshape(1, -1)

    return _batches.run(call, rows, batch=1)


USAGE = '''\
import MNN


def open_tower(tower):
    """A function from one input array to its embedding."""
    entry, expr = bundle[tower], MNN.expr
    names = [entry["input"]["name"]], [entry["output"]["name"]]
    module = MNN.nn.load_module_from_file(entry["file"], *names)
    kind = expr.int if entry["input"]["dtype"] == "int32" else expr.float

    def run(array):
        [found] = module.onForward([expr.const(array[None], [1, *array.shape], expr.NCHW, kind)])
        return np.array(expr.convert(found, expr.NCHW).read()).reshape(-1)

    return run
'''
