"""What a token costs: the products of ViT-B's layers by number of tokens; for reduction.py.

At batch 1 a layer's weights are read once a picture, whatever the number of tokens: that time is
the floor under which no schedule comes, and the least share of it says how near to the ratio of
multiply-adds a speed-up can be.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.experiments import _reduction_latency as latency
from compress.atomic import write_json
from export import _int8

LAYERS, WIDTH = 6, 768
SHAPES = ((WIDTH, 3 * WIDTH), (3 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
"""The matrices of a layer; the one behind attention is read as wide as what it follows here."""
TOKENS = (1, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 197)
"""With one more than a multiple of 16 beside it: matrix units compute whole rows of tiles."""
ROUNDS = 40

Rows = list[dict[str, Any]]


def measure(folder: Path) -> Rows:
    """Rows of both runtimes and precisions, kept in `folder` once measured."""
    path = folder / "tokens.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, _rows(folder))
    found: Rows = json.loads(path.read_text())
    return found


def _rows(folder: Path) -> Rows:
    calls: list[latency.Call] = []
    rows: Rows = []
    for tokens in TOKENS:
        path, shape = folder / f"{tokens}.fp32.onnx", (1, tokens, WIDTH)
        model = chain(tokens)
        onnx.save(model, path)
        integers = folder / f"{tokens}.int8.onnx"
        onnx.save(_int8.rewrite(model), integers)
        made = [("onnxruntime", "fp32", latency.onnxruntime(path))]
        made += [("onnxruntime", "int8", latency.onnxruntime(integers))]
        latency.write_openvino(path, shape)
        made += latency.openvino(path, float_too=True)
        array = torch.randn(shape, generator=torch.Generator().manual_seed(1)).numpy()
        for target, precision, call in made:
            calls.append(_given(call, array))
            row = {"part": "tokens", "target": target, "precision": precision}
            rows.append({**row, "tokens": tokens, "layers": LAYERS, "width": WIDTH})
    for row, samples in zip(rows, latency.in_turns(calls, torch.empty(0), ROUNDS), strict=True):
        row |= latency.medians(samples)
    return rows


def _given(call: latency.Call, array: np.ndarray) -> latency.Call:
    """The call on an array of its own, whatever it is given: each has another number of tokens."""
    return lambda _: call(array)


def chain(tokens: int) -> Any:
    """The matrices of LAYERS layers one after the other, random weights -> onnx.ModelProto."""
    random, nodes, weights, current = np.random.default_rng(0), [], [], "pixels"
    for number, (wide, out) in enumerate(SHAPES * LAYERS):
        matrix = random.normal(scale=wide**-0.5, size=(wide, out)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(matrix, f"weight{number}"))
        inputs, current = [current, f"weight{number}"], f"product{number}"
        nodes.append(onnx.helper.make_node("MatMul", inputs, [current]))
    given, made = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, tokens, WIDTH])
        for name in ("pixels", current)
    )
    graph = onnx.helper.make_graph(nodes, "layers", [given], [made], weights)
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )


def floors(rows: Rows) -> dict[tuple[str, str], float]:
    """(target, precision) -> time at one token over that at the most."""
    own = [row for row in rows if row["part"] == "tokens"]
    time = {(r["target"], r["precision"], r["tokens"]): r["processor_p50_ms"] for r in own}
    return {key: time[*key, 1] / time[*key, max(TOKENS)] for key in {k[:2] for k in time}}
