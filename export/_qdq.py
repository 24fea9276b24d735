"""Rewrites a float ONNX graph with symmetric QuantizeLinear and DequantizeLinear pairs.

Symmetric, because TensorRT knows no zero point. Matrix products with constant weights are
quantized; the patch projection and the projection into the embedding stay float, as they cost
little time and much accuracy.

Shapes: D input width of a layer, O output width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# Ranges leave out one value in 10,000, so that an outlier doesn't cost all others their precision.
QUANTILE = 0.9999
SMALLEST = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True)
class Kind:
    """A number format of eight bits."""

    dtype: np.dtype[Any]
    largest: float
    per_column: bool
    """Whether weights have a scale for each output column, or one."""


INT8 = Kind(np.dtype(np.int8), 127.0, True)
# E4M3 keeps its relative precision over a wide range: TensorRT's kernels take one scale.
FP8 = Kind(np.dtype(ml_dtypes.float8_e4m3fn), 448.0, False)


def quantize_weight(weight: np.ndarray, axis: int, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Float weights -> eight bits and float32 scales, weight = bits * scale along `axis`.

    A column of zeros gets scale 1, and no scale is smaller than half precision holds. Scales: [O],
    or a scalar where `kind` has one for all.
    """
    others = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight).max(axis=others if kind.per_column else None)
    scale = np.where(largest > 0, np.maximum(largest / kind.largest, SMALLEST), 1.0)
    scale = scale.astype(np.float16).astype(np.float32)  # as it will be stored
    shape = [1] * weight.ndim
    if kind.per_column:
        shape[axis] = -1
    bits = np.clip(weight / scale.reshape(shape), -kind.largest, kind.largest)
    return (np.rint(bits) if kind is INT8 else bits).astype(kind.dtype), scale


def layers(model: Any) -> list[tuple[Any, int]]:
    """Matrix products with constant weights but the last: (node, axis of the output columns)."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants:
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            found.append((node, 0 if turned else 1))
    return found[:-1]


def ranges(model: Any, rows: Iterable[np.ndarray]) -> dict[str, float]:
    """Largest magnitude, outliers left out, of each tensor that enters a layer.

    rows: calls of the graph, each [B, ...].
    """
    import onnx
    import onnxruntime

    names = sorted({node.input[0] for node, _ in layers(model)})
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    probed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options)
    source = session.get_inputs()[0].name
    found = dict.fromkeys(names, 0.0)
    for row in rows:
        for name, value in zip(names, session.run(names, {source: row})):
            largest = float(np.quantile(np.abs(value), QUANTILE))
            found[name] = max(found[name], largest)
    return found


def rewrite(model: Any, ranges: Mapping[str, float], kind: Kind) -> Any:
    """onnx.ModelProto -> the same with both inputs of each layer passed through eight bits."""
    from onnx import helper, numpy_helper

    rewritten = type(model)()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, list[Any]] = {}

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def pair(name: str) -> str:
        """Quantize and dequantize an activation, once for all layers that read it."""
        if f"{name}_rounded" not in made:
            scale = np.float32(max(ranges[name] / kind.largest, SMALLEST))
            arguments = [
                constant(f"{name}_scale", np.array(scale)),
                constant(f"{name}_zero", np.zeros((), kind.dtype)),
            ]
            made[f"{name}_rounded"] = [
                helper.make_node("QuantizeLinear", [name, *arguments], [f"{name}_bits"]),
                helper.make_node(
                    "DequantizeLinear", [f"{name}_bits", *arguments], [f"{name}_rounded"]
                ),
            ]
        return f"{name}_rounded"

    def stored(name: str, axis: int) -> str:
        """A weight as its bits with a node that scales them."""
        if f"{name}_float" not in made:
            bits, scale = quantize_weight(numpy_helper.to_array(weights[name]), axis, kind)
            arguments = [constant(f"{name}_bits", bits), constant(f"{name}_scale", scale)]
            attributes: dict[str, Any] = {"axis": axis} if kind.per_column else {}
            node = helper.make_node("DequantizeLinear", arguments, [f"{name}_float"], **attributes)
            made[f"{name}_float"] = [node]
        return f"{name}_float"

    nodes: list[Any] = []
    quantized = {node.output[0]: axis for node, axis in layers(rewritten)}
    for node in graph.node:
        if node.output[0] in quantized:
            before = set(made)
            node.input[0] = pair(node.input[0])
            node.input[1] = stored(node.input[1], quantized[node.output[0]])
            nodes += [new for name in made if name not in before for new in made[name]]
        nodes.append(node)
    _replace_nodes(graph, nodes)
    return rewritten


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Put nodes in place, and drop weights that nothing reads any more."""
    read = {name for node in nodes for name in node.input}
    for field, kept in (
        (graph.node, nodes),
        (graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read]),
    ):
        copies = [type(message).FromString(message.SerializeToString()) for message in kept]
        del field[:]
        field.extend(copies)
