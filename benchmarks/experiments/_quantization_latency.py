"""Times our 8-bit files of ViT-B against each runtime's stock 8 bits, and against the int8 peak.

Image towers of random weights, batch 1, one thread, files interleaved. Times are of the processor,
so that other work on the machine delays them but does not count.
"""

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import roofline
from benchmarks.experiments._quantization_arms import PLAIN
from compress import calibrate, plugin, ptq
from compress.clip import Clip
from compress.stages import quantize
from export import _int8, _scheme
from export import onnx as portable

# Multiply-adds of the image towers' matrices, batch 1.
MACS = {"ViT-B-32": 4.37e9, "ViT-B-16": 17.5e9}
ROUNDS, WARM_UP = 15, 2
SIDES = (768, 1536)
"""Square int8 matrices whose product gives the peak."""
TRIES = 8

Call = Callable[[], Any]


def rows(name: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each file of a tower; files are made in `folder` where they aren't there yet."""
    calls = opened(name, folder)
    peak = int8_peak()
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(ROUNDS + WARM_UP):
        for label, call in calls.items():
            times[label].append(_milliseconds(call))
    found = []
    for label, each in times.items():
        row = {"model": name, "arm": f"latency {label}", "seed": 0, "executed": True}
        row |= {"p50_ms": float(np.median(each[WARM_UP:])), "min_ms": min(each)}
        found.append(row | {"clock": "process", "int8_peak_gflops": peak, "num_macs": MACS[name]})
    return found


def _milliseconds(call: Call) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def int8_peak() -> float:
    """Most gigaflops of a product of int8 matrices, one thread, processor time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    best = 0.0
    for make, side in product(roofline.int8_products(1), SIDES):
        multiply = make(side)
        if multiply is not None:
            least = min(_milliseconds(multiply) for _ in range(TRIES))
            best = max(best, 2 * side**3 / least / 1e6)
    torch.set_num_threads(before)
    return best


def opened(name: str, folder: Path) -> dict[str, Call]:
    """Calls that embed one image: label -> function."""
    folder.mkdir(parents=True, exist_ok=True)
    clip: Clip = plugin.source(f"open_clip:{name}/random", Path.cwd())
    pixels = np.zeros((1, 3, *clip.preprocess.size), np.float32)
    made: dict[str, tuple[str, Callable[[Clip, Path], None], Callable[[Path, np.ndarray], Call]]]
    made = {
        "onnxruntime float": ("float.onnx", _float, _ort),
        "onnxruntime stock int8": ("stock.onnx", _ort_stock, _ort),
        "onnxruntime ours, dynamic": ("dynamic.onnx", _ort_dynamic, _ort),
        "onnxruntime ours, static": ("static.onnx", _ort_static, _ort),
        "openvino float": ("float.onnx", _float, _openvino),
        "openvino stock int8": ("stock.xml", _nncf, _openvino),
        "openvino ours, static": ("qdq.onnx", _qdq, _openvino),
    }
    calls = {}
    for label, (file, write, load) in made.items():
        path = folder / file
        if not path.exists():
            write(clip, path)
        calls[label] = load(path, pixels)
    return calls


def _ort(path: Path, pixels: np.ndarray) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return lambda: session.run(None, {session.get_inputs()[0].name: pixels})


def _openvino(path: Path, pixels: np.ndarray) -> Call:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer({0: pixels})


def _float(clip: Clip, path: Path) -> None:
    _save(portable.graph(clip, "image", 1, 20), path)


def _ort_stock(clip: Clip, path: Path) -> None:
    """ONNX Runtime's own dynamic quantization, its default for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        path.with_name("float.onnx"),
        path,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def _ort_dynamic(clip: Clip, path: Path) -> None:
    _save(_int8.rewrite(portable.graph(clip, "image", 1, 20)), path)


def _ort_static(clip: Clip, path: Path) -> None:
    rounded = _rounded(clip)
    graph = portable.graph(rounded, "image", 1, 20)
    _save(_scheme.realise(graph, rounded, "image", "onnxruntime")[0], path)


def _qdq(clip: Clip, path: Path) -> None:
    rounded = _rounded(clip)
    graph = portable.graph(rounded, "image", 1, 20)
    _save(_scheme.realise(graph, rounded, "image", "qdq")[0], path)


def _nncf(clip: Clip, path: Path) -> None:
    """NNCF's default for transformers."""
    import nncf
    import openvino

    model = openvino.convert_model(path.with_name("float.onnx"))
    sample = np.random.default_rng(0).random((1, 3, *clip.preprocess.size), dtype=np.float32)
    kind = nncf.ModelType.TRANSFORMER
    found = nncf.quantize(model, nncf.Dataset([sample]), model_type=kind, subset_size=1)
    openvino.save_model(found, path)


def _rounded(clip: Clip) -> Clip:
    """W8A8 by extremes: what time it takes doesn't depend on how ranges were found."""
    cfg = quantize.Config(towers=("image",), **PLAIN)
    tokens = clip.tokenizer(["a"])
    pixels = torch.rand(2, 3, *clip.preprocess.size)
    pairs = calibrate.Calibration(pixels, tokens.repeat(2, 1), tokens)
    made = ptq.quantize(clip.model, quantize.plan(clip.model, cfg), pairs, "none", False)
    return clip.with_model(made.model, {})


def _save(graph: Any, path: Path) -> None:
    import onnx

    onnx.save(graph, path)
