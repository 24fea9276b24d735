"""ncnn for phones and small boards: both towers through pnnx, in the layers that ncnn has.

ncnn has no unbind, argmax, comparison, TopK or gather: attention gets three projections in place of
one, the text tower finds its pooled token by a second, one-column embedding, and the tokens that a
smaller image tower keeps are found by sums (`compress/nn/choose.py`).

Shapes: N tokens, L text tokens, D width, H heads, K head width, E embedding.
"""

import importlib.util
import platform
import subprocess
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.clip import Clip
from compress.layers import Attention, AttentionPool
from compress.model import TextTower
from compress.nn import choose
from compress.structure import TextConfig
from export import Unavailable, _batches, _bundle
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
            convert(rewritten(clip, tower), example, folder, tower, cfg.precision == "fp16")


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


class _SplitAttention(nn.Module):
    """Attention with a projection each for q, k and v."""

    def __init__(self, attention: Attention | SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.head_width = attention.heads, attention.head_width
        weights = attention.qkv.weight.detach().chunk(3)
        biases = attention.qkv.bias.detach().chunk(3)
        scales = (self.head_width**-0.5, 1.0, 1.0)
        parts = [_linear(w * s, b * s) for w, b, s in zip(weights, biases, scales)]
        self.query, self.key, self.value = parts
        # Token reduction and single-token blocks read the weights themselves.
        self.qkv, self.out = attention.qkv, attention.out

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [1, N, D], mask [N, N] -> [1, N, D]."""
        tokens = x.shape[1]
        heads = (1, tokens, self.heads, self.head_width)
        q, k, v = (
            part(x).reshape(heads).transpose(1, 2) for part in (self.query, self.key, self.value)
        )  # each [1, H, N, K]
        scores = q @ k.transpose(2, 3)  # [1, H, N, N]
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(dim=-1) @ v  # [1, H, N, K]
        return self.out(mixed.transpose(1, 2).reshape(1, tokens, self.heads * self.head_width))


class _SplitPool(nn.Module):
    """Attention pooling with a projection each for k and v."""

    query: Tensor

    def __init__(self, pool: AttentionPool) -> None:
        super().__init__()
        self.pool, self.heads, self.head_width = pool, pool.heads, pool.head_width
        weights, biases = pool.kv.weight.detach().chunk(2), pool.kv.bias.detach().chunk(2)
        self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases))
        query = pool.query.detach() * self.head_width**-0.5
        self.register_buffer("query", query.view(1, self.heads, 1, self.head_width))

    def forward(self, x: Tensor) -> Tensor:
        """x [1, N, D] -> [1, pooled width]."""
        heads = (1, x.shape[1], self.heads, self.head_width)
        k, v = (part(x).reshape(heads).transpose(1, 2) for part in (self.key, self.value))
        weights = (self.query @ k.transpose(2, 3)).softmax(dim=-1)  # [1, H, 1, N]
        pooled = self.pool.out((weights @ v).reshape(1, self.heads * self.head_width))
        return pooled if self.pool.mlp is None else pooled + self.pool.mlp(self.pool.norm(pooled))


class _SplitMapAttention(nn.Module):
    """Attention of timm's fastvit, over a map of features, with a projection each for q, k, v."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        qkv = attention.qkv
        bias = torch.zeros(qkv.out_features) if qkv.bias is None else qkv.bias.detach()
        parts = SimpleNamespace(heads=attention.num_heads, head_width=attention.head_dim)
        parts.qkv, parts.out = _linear(qkv.weight.detach(), bias), attention.proj
        self.inside = _SplitAttention(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, D, rows, columns] -> the same shape."""
        _, width, rows, columns = x.shape
        mixed = self.inside(x.reshape(1, width, rows * columns).transpose(1, 2))  # [1, N, D]
        return mixed.transpose(1, 2).reshape(1, width, rows, columns)


def _split() -> dict[type[nn.Module], Any]:
    """Layer -> what stands for it."""
    from timm.models import fastvit

    own: dict[type[nn.Module], Any] = {Attention: _SplitAttention, AttentionPool: _SplitPool}
    return own | {fastvit.Attention: _SplitMapAttention}


class _EndPooling(nn.Module):
    """The token at the first end mark, found without comparing ids."""

    def __init__(self, vocab_size: int, length: int, end_id: int) -> None:
        super().__init__()
        marks = torch.zeros(vocab_size, 1)
        marks[end_id] = 1
        self.is_end = nn.Embedding.from_pretrained(marks)
        # Row i sums what stands before token i.
        self.before = _linear(torch.ones(length, length).tril(-1))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [1, L, D], tokens [1, L] -> [1, D]."""
        ends = self.is_end(tokens).transpose(1, 2)  # [1, 1, L], 1 at each end mark
        first = ends * F.relu(1 - self.before(ends))
        return (first @ x).reshape(1, x.shape[-1])


def rewritten(clip: Clip, tower: str) -> nn.Module:
    """One tower, normalised, for a batch of 1, computing the same with ncnn's layers."""
    unit, split = portable.unit(clip, tower), _split()
    for parent in list(unit.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in split:
                setattr(parent, name, split[type(child)](child))
    module = unit.get_submodule("tower")
    if isinstance(module, TextTower) and _pools_at_end(module):
        # One token of the last block would need gather; all of them give the same embedding.
        module.config = config = module.config.model_copy(update={"last_block": "all"})
        end = clip.tokenizer.contract.end_id if config.pooling == "argmax" else config.end_id
        module.pooling = _EndPooling(config.vocab_size, config.context_length, end)
        # Shadows the method; a plain assignment would only register another child.
        object.__setattr__(module, "_pooled", module.pooling)
    return unit.eval()


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


def _pools_at_end(tower: TextTower) -> bool:
    return tower.class_token is None and tower.config.pooling in ("argmax", "end")


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """weight [out, in] -> a layer that holds it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer


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
