"""Settings and timed files of the quantization experiment."""

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import plugin
from compress.clip import Clip
from compress.layers import Block
from compress.model import ClipModel
from compress.nn.vectors import Kind

RUNTIMES = {
    "onnxruntime": {"precision": "int8"},
    "openvino": {"precision": "int8"},
    "litert": {"precision": "int8-static"},
}
# LiteRT's pattern of operators is for fixed ranges.
STATIC_ONLY, STATIC = ("litert",), ("w8a8", "w8a8 plain")
FIXED_PROMPTS = "w8a8"
PLAIN: dict[str, Any] = {"equalize": "none", "ranges": "minmax", "bias_correction": False}
W4 = {
    "act_bits": None,
    "weight_bits": 4,
    "group": 32,
    "weight_symmetric": False,
    "projection_bits": 8,
}
EXECUTED: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w8a8 plain": dict(PLAIN),
    "w8a8 dynamic": {"act": "dynamic"},
    "w8": {"act_bits": None},
    "w4 rtn": {**W4, **PLAIN},
    "w4": {**W4, "equalize": "awq", "rounding": "gptq"},
}


def runtimes(arm: str) -> list[str]:
    """Where an arm is executed."""
    return [name for name in RUNTIMES if name not in STATIC_ONLY or arm in STATIC]


VECTORS: tuple[Kind, ...] = ("float32", "int8", "int4", "binary")
OUTLIERS = {"plain": dict(PLAIN), "cured": {}}

UNIFORM = {"attention": True, "equalize": "none", "ranges": "percentile"}
REPQ = {**UNIFORM, "family": "repq", "equalize": "repq"}
ADALOG = {**UNIFORM, "family": "adalog", "equalize": "repq", "ranges": "mse"}
RECONSTRUCTED = {**ADALOG, "reconstruction": {"iterations": 150, "batch_size": 16}}


def _bits(bits: int, settings: dict[str, Any]) -> dict[str, Any]:
    return {"weight_bits": bits, "act_bits": bits, **settings}


def _mixed(provider: str) -> dict[str, Any]:
    return {"weight_bits": 4, "act_bits": 4, **REPQ, "mixed": {"provider": provider}}


SIMULATED: dict[str, dict[str, Any]] = {
    "w6a6 uniform": _bits(6, UNIFORM),
    "w6a6 adalog": _bits(6, ADALOG),
    "w4a4 uniform": _bits(4, UNIFORM),
    "w4a4 twin": _bits(4, {**UNIFORM, "family": "twin"}),
    "w4a4 ptf": _bits(4, {**UNIFORM, "family": "ptf"}),
    "w4a4 repq": _bits(4, REPQ),
    "mixed lrp": _mixed("lrp"),
    "mixed fisher": _mixed("fisher"),
    "mixed uniform": _mixed("uniform"),
    "mixed random": _mixed("random"),
    "w4a4 adalog": _bits(4, ADALOG),
    "w4a4 adalog erq": _bits(4, {**ADALOG, "rounding": "ridge"}),
    "w4a4 reconstructed": _bits(4, RECONSTRUCTED),
    "w3a3 uniform": _bits(3, UNIFORM),
    "w3a3 adalog": _bits(3, ADALOG),
    "w3a3 reconstructed": _bits(3, RECONSTRUCTED),
}


def with_outliers(model: ClipModel, reach: float = 60.0, every: int = 37) -> ClipModel:
    """The same function, with every so many channel of each norm `reach` times as large."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for block in made.modules():
            if not isinstance(block, Block):
                continue
            pairs = ((block.norm1, block.attention.qkv), (block.norm2, block.mlp.up))
            for norm, linear in pairs:
                norm.weight[::every] *= reach
                norm.bias[::every] *= reach
                linear.weight[:, ::every] /= reach
    return made


NAMES = ("ViT-B-32", "ViT-B-16")
ROUNDS = 25


def latency_rows() -> list[dict[str, Any]]:
    """Our files against each runtime's stock int8, image towers of random weights, 1 thread."""
    from benchmarks import roofline

    peak = roofline.peaks(1)["int8_gflops"]
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            calls = timed_files(name, Path(folder))
            times: dict[str, list[float]] = {label: [] for label in calls}
            for _ in range(ROUNDS + 3):
                for label, call in calls.items():
                    start = time.perf_counter()
                    call()
                    times[label].append((time.perf_counter() - start) * 1e3)
        for label, found in times.items():
            row = {"model": name, "arm": f"latency {label}", "seed": 0, "executed": True}
            rows.append(row | {"p50_ms": float(np.median(found[3:])), "min_ms": min(found)})
            rows[-1] |= {"int8_peak_gflops": peak, "num_macs": MACS[name]}
    return rows


# Multiply-adds of the image towers' matrices, batch 1.
MACS = {"ViT-B-32": 4.37e9, "ViT-B-16": 17.5e9}


def timed_files(name: str, folder: Path) -> dict[str, Any]:
    """Calls that embed one image: label -> function."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from export import onnx as portable

    clip: Clip = plugin.source(f"open_clip:{name}", Path.cwd())
    pixels = np.zeros((1, 3, *clip.preprocess.size), np.float32)
    onnx.save(portable.graph(clip, "image", 1, 20), folder / "float.onnx")
    quantize_dynamic(
        folder / "float.onnx", folder / "stock.onnx", per_channel=True,
        weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
    )  # fmt: skip
    files = {"onnxruntime float": "float.onnx", "onnxruntime stock int8": "stock.onnx"}
    onnx.save(_ours(clip, "dynamic"), folder / "dynamic.onnx")
    onnx.save(_ours(clip, "static"), folder / "static.onnx")
    files |= {
        "onnxruntime ours, dynamic": "dynamic.onnx",
        "onnxruntime ours, static": "static.onnx",
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {k: onnxruntime.InferenceSession(folder / v, options) for k, v in files.items()}
    return {
        label: (lambda s=session: s.run(None, {s.get_inputs()[0].name: pixels}))
        for label, session in sessions.items()
    }


def _ours(clip: Clip, act: str) -> Any:
    from compress import calibrate, ptq
    from compress.stages import quantize
    from export import _int8, _scheme
    from export import onnx as portable

    if act == "dynamic":
        return _int8.rewrite(portable.graph(clip, "image", 1, 20))
    cfg = quantize.Config(towers=("image",), **PLAIN)
    size = clip.preprocess.size
    tokens = clip.tokenizer(["a"])
    pairs = calibrate.Calibration(torch.rand(2, 3, *size), tokens.repeat(2, 1), tokens)
    made = ptq.quantize(clip.model, quantize.plan(clip.model, cfg), pairs, "none", False)
    rounded = clip.with_model(made.model, {})
    graph, _ = _scheme.realise(
        portable.graph(rounded, "image", 1, 20), rounded, "image", "onnxruntime"
    )
    return graph
