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
    rewritten = type(model)()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    pairs = Pairs(graph, kind)
    nodes: list[Any] = []
    quantized = {node.output[0]: axis for node, axis in layers(rewritten)}
    for node in graph.node:
        if node.output[0] in quantized:
            before = set(pairs.made)
            node.input[0] = pairs.activation(node.input[0], ranges[node.input[0]])
            node.input[1] = pairs.weight(node.input[1], quantized[node.output[0]])
            nodes += [new for name in pairs.made if name not in before for new in pairs.made[name]]
        nodes.append(node)
    _replace_nodes(graph, nodes)
    return rewritten


class Pairs:
    """Makes the nodes that pass a graph's tensors through eight bits, once for each tensor."""

    def __init__(self, graph: Any, kind: Kind) -> None:
        self.graph, self.kind = graph, kind
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.made: dict[str, list[Any]] = {}
        """Nodes by the tensor that they make."""

    def activation(self, name: str, largest: float) -> str:
        """Quantize and dequantize an activation -> the name of what comes out."""
        from onnx import helper

        result = f"{name}_rounded"
        if result not in self.made:
            scale = np.float32(max(largest / self.kind.largest, SMALLEST))
            arguments = [
                self._constant(f"{name}_scale", np.array(scale)),
                self._constant(f"{name}_zero", np.zeros((), self.kind.dtype)),
            ]
            self.made[result] = [
                helper.make_node("QuantizeLinear", [name, *arguments], [f"{name}_bits"]),
                helper.make_node("DequantizeLinear", [f"{name}_bits", *arguments], [result]),
            ]
        return result

    def weight(self, name: str, axis: int) -> str:
        """Store a weight as its bits, with a node that scales them -> the name of its floats."""
        from onnx import helper, numpy_helper

        result = f"{name}_float"
        if result not in self.made:
            array = numpy_helper.to_array(self.weights[name])
            bits, scale = quantize_weight(array, axis, self.kind)
            arguments = [
                self._constant(f"{name}_bits", bits),
                self._constant(f"{name}_scale", scale),
            ]
            attributes: dict[str, Any] = {"axis": axis} if self.kind.per_column else {}
            node = helper.make_node("DequantizeLinear", arguments, [result], **attributes)
            self.made[result] = [node]
        return result

    def _constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name


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
