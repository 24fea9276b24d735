"""ncnn for phones and small boards: both towers through pnnx, in the layers that ncnn has.

ncnn has no unbind, argmax, comparison, TopK or gather: attention gets three projections in place of
one, the text tower finds its pooled token by a second, one-column embedding, and the tokens that a
smaller image tower keeps are found by sums (`compress/nn/choose.py`).

Shapes: B rows, E embedding.
"""

import importlib.util
import platform
import subprocess
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.clip import Clip
from compress.nn import choose
from compress.structure import TextConfig
from export import Unavailable, _batches, _bundle, _ncnn_layers
from export import onnx as portable

VERSION = 1
REQUIRES = "ncnn"

MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999}


class Config(BaseModel):
    """Settings of the ncnn files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Literal["fp32", "fp16"] = "fp32"
    """Type of the stored weights. Arithmetic is float32 in `load`; on phones `opt` of ncnn's Net
    chooses it, and half precision is safe: no value depends on more than 11 bits."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.9999 for fp32, 0.999 for fp16."""


class NcnnEncoder:
    """Both towers of a bundle in ncnn, one input a call.

    Shapes: B any number of inputs, E embedding.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        self.image, self.text = (_net(folder, tower, threads) for tower in _bundle.TOWERS)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return _run(self.image, "image", pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return _run(self.text, "text", tokens.to(torch.int32).numpy(force=True))


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Convert both towers into a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model, Unavailable without ncnn or where
    it lacks a layer of this model.
    """
    _require("ncnn", "pnnx")
    lacking = refuses(clip)
    if lacking:
        raise Unavailable(lacking)
    with _bundle.writing(clip, out, spec(cfg)) as folder:
        for tower in _bundle.TOWERS:
            example = portable.example(clip, tower, batch=1)
            module = _ncnn_layers.rewritten(clip, tower)
            convert(module, example, folder, tower, cfg.precision == "fp16")


def refuses(clip: Clip) -> str | None:
    """What ncnn lacks for a model, as far as its structure tells."""
    text = clip.model.config.text
    if not isinstance(text, TextConfig):
        return None
    if text.pad_id is not None:
        return "ncnn has no comparison: the text tower masks its padding"
    highest = max(clip.tokenizer.tokenizer.get_vocab().values())
    end = clip.tokenizer.contract.end_id
    if text.pooling == "argmax" and highest > end:
        return (
            f"ncnn has no argmax: the text tower pools at the highest id, {highest} in "
            f"tokenizer.json, which should be end_id {end}"
        )
    return None


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> NcnnEncoder:
    """Open a bundle in ncnn on the CPU; `threads` None means one."""
    _require("ncnn")
    if device != "cpu":
        raise Unavailable(f"ncnn bundles are checked on the CPU, not on {device}")
    return NcnnEncoder(Path(folder), threads)


def spec(cfg: Config) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    gate = MIN_COSINE[cfg.precision] if cfg.min_cosine is None else cfg.min_cosine
    proved = {"ncnn": metadata.version("ncnn"), "cpu": platform.machine()}
    runtime = {"weights": "image.bin, text.bin", "arithmetic": "fp32", "proved_with": proved}
    return _bundle.Spec(
        "ncnn", cfg.precision, "param", 1, gate, load, USAGE, runtime, requirements="ncnn"
    )


def convert(module: nn.Module, example: Tensor, folder: Path, tower: str, half: bool) -> None:
    """Write `tower`.param and `tower`.bin into `folder`.

    Raises Unavailable with the layers that ncnn lacks.
    """
    import pnnx

    script = folder / f"{tower}.pt"
    with warnings.catch_warnings(), torch.no_grad(), choose.by_arithmetic():
        warnings.simplefilter("ignore")  # shapes become constants, as they should
        torch.jit.trace(module, example, check_trace=False).save(str(script))
    kind = "i32" if example.dtype == torch.int32 else "f32"
    shape = f"[{','.join(map(str, example.shape))}]{kind}"
    command = [pnnx.EXEC_PATH, script.name, f"inputshape={shape}", f"fp16={int(half)}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    param, weights = (folder / f"{tower}.ncnn.{ending}" for ending in ("param", "bin"))
    if done.returncode or not param.is_file():
        said = (done.stdout + done.stderr).strip().splitlines()[-2:]
        raise Unavailable(f"pnnx cannot convert the {tower} tower: {' / '.join(said)}")
    text = param.read_text()
    missing = sorted({line.split()[0] for line in text.splitlines() if "." in line.split()[0]})
    if missing:
        raise Unavailable(f"ncnn has no layer for the {tower} tower's {', '.join(missing)}")
    (folder / f"{tower}.param").write_text(_named(text, tower))
    weights.rename(folder / f"{tower}.bin")
    for left in folder.glob(f"{tower}[._]*"):
        if left.name not in (f"{tower}.param", f"{tower}.bin"):
            left.unlink()


def _named(param: str, tower: str) -> str:
    """The graph with the bundle's names for its input and output."""
    names = {"in0": _bundle.INPUTS[tower], "out0": _bundle.OUTPUTS[tower]}
    lines = [
        " ".join(names.get(word, word) for word in line.split()) for line in param.splitlines()
    ]
    return "\n".join(lines) + "\n"


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"{missing[0]} is not installed: pip install 'pocketclip[ncnn]'")


def _net(folder: Path, tower: str, threads: int | None) -> Any:
    import ncnn

    net = ncnn.Net()
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{option}", False)
    net.opt.num_threads = threads or 1
    files = [folder / f"{tower}.{ending}" for ending in ("param", "bin")]
    if net.load_param(str(files[0])) or net.load_model(str(files[1])):
        raise Unavailable(f"ncnn {ncnn.__version__} cannot read {files[0].name}; export it again")
    return net


def _run(net: Any, tower: str, rows: np.ndarray) -> Tensor:
    """rows [B, ...] -> [B, E]."""
    import ncnn

    def call(row: np.ndarray) -> np.ndarray:
        # Mat borrows the array's memory: it must live until the output is copied.
        array = np.ascontiguousarray(row[0])
        extractor = net.create_extractor()
        extractor.input(_bundle.INPUTS[tower], ncnn.Mat(array))
        return np.array(extractor.extract(_bundle.OUTPUTS[tower])[1]).reshape(1, -1)

    return _batches.run(call, rows, batch=1)


USAGE = '''\
import ncnn


def open_tower(tower):
    """A function from one input array to its embedding."""
    entry, net = bundle[tower], ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(entry["file"])
    net.load_model(entry["file"].replace(".param", ".bin"))

    def run(array):
        extractor = net.create_extractor()
        extractor.input(entry["input"]["name"], ncnn.Mat(array))
        return np.array(extractor.extract(entry["output"]["name"])[1]).reshape(-1).copy()

    return run
'''
