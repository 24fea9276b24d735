"""Rewrites a float ONNX graph into ONNX Runtime's int8 operators.

Weights get one scale per output column, activations one scale per call, found while running. What
is fused and why was measured: batch 1, one thread, 65 tokens of width 128 (x86 with VNNI).
DynamicQuantizeMatMul beat static QDQ, MatMulIntegerToFloat and QGemm; QAttention beat the written
out attention by 10 %; SkipLayerNormalization is left out, as it cost 30 %.

Shapes: D input width of a layer, O output width, V rows of the token table, N tokens,
H heads, K head width.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"

# -127..127, so that -w has the same error as w.
FULL_RANGE = 127
# A CPU without VNNI adds two u8*s8 products in 16 bits: 2 * 255 * 64 just fits.
REDUCED_RANGE = 64


def quantize_weight(weight: np.ndarray, limit: int = FULL_RANGE) -> tuple[np.ndarray, np.ndarray]:
    """[D, O] float -> int8 [D, O] and float32 scales [O], with weight = int8 * scale.

    A column of zeros gets scale 1. `limit` is the largest magnitude used.
    """
    largest = np.abs(weight).max(axis=0)
    scale = np.where(largest > 0, largest / limit, 1.0).astype(np.float32)
    return np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8), scale


def rewrite(model: Any, limit: int = FULL_RANGE) -> Any:
    """onnx.ModelProto of one float tower -> the same tower with int8 weights and tables."""
    graph_model = ir.from_proto(model)
    graph = graph_model.graph
    for node in list(graph):
        if node.op_type == "Conv":
            patches_to_matmul(graph, node)
    for node in list(graph):
        found = find_attention(node) if node.op_type == "Softmax" else None
        if found:
            _fuse_attention(graph, found, limit)
    for node in list(graph):
        if node.op_type in ("MatMul", "Gemm"):
            _quantize_matmul(graph, node, limit)
        elif node.op_type == "Gather":
            _quantize_table(graph, node)
    remove_unused(graph)
    graph.opset_imports[CONTRIB] = 1
    return ir.to_proto(graph_model)


def patches_to_matmul(graph: ir.Graph, conv: ir.Node) -> None:
    """Conv over patches that don't overlap, flattened -> a MatMul, which has int8 kernels."""
    pixels, weight = conv.inputs[0], constant(conv.inputs[1])
    flat = _only_user(conv.outputs[0], "Reshape")
    tokens = flat and _only_user(flat.outputs[0], "Transpose")
    if pixels is None or pixels.shape is None or weight is None or weight.ndim != 4 or not tokens:
        return
    out, channels, high, wide = weight.shape
    attributes = conv.attributes
    if (
        pixels.shape[1] != channels
        or list(attributes["strides"].as_ints()) != [high, wide]
        or any(attributes["pads"].as_ints() if "pads" in attributes else ())
        or any(n != 1 for n in attributes["dilations"].as_ints() if "dilations" in attributes)
        or list(tokens.attributes["perm"].as_ints()) != [0, 2, 1]
    ):
        return
    batch, _, rows, columns = pixels.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    batch = batch if isinstance(batch, int) else 0  # a Reshape keeps the input's own there
    rows, columns = rows // high, columns // wide
    grid = initializer(
        graph, np.array([batch, channels, rows, high, columns, wide]), f"{conv.name}_grid"
    )
    line = initializer(
        graph, np.array([batch, rows * columns, channels * high * wide]), f"{conv.name}_line"
    )
    matrix = initializer(graph, weight.reshape(out, -1).T.copy(), f"{conv.name}_matrix")
    patches = ir.node("Reshape", [pixels, grid])
    ordered = ir.node("Transpose", patches.outputs, {"perm": [0, 2, 4, 1, 3, 5]})
    rows_of_pixels = ir.node("Reshape", [ordered.outputs[0], line])
    product = ir.node("MatMul", [rows_of_pixels.outputs[0], matrix])
    nodes = [patches, ordered, rows_of_pixels, product]
    if len(conv.inputs) > 2:
        nodes.append(ir.node("Add", [product.outputs[0], conv.inputs[2]]))
    replace(graph, tokens, nodes)


@dataclass(frozen=True)
class Attention:
    """Written-out self-attention as found in a graph, between `x` and `last`."""

    x: ir.Value
    weight: np.ndarray
    """[D, 3 * H * K], q, k and v beside each other."""
    bias: ir.Value
    heads: int
    causal: bool
    last: ir.Node
    name: str


def find_attention(softmax: ir.Node) -> Attention | None:
    """The self-attention around a Softmax, if it is plain or causal and scaled as usual."""
    add = _up(softmax.inputs[0], "Add")
    mask = constant(add.inputs[1]) if add else None
    if add and (mask is None or not _is_causal(mask)):
        return None
    scores = _up(add.inputs[0] if add else softmax.inputs[0], "MatMul")
    mixed = _only_user(softmax.outputs[0], "MatMul")
    swapped = mixed and _only_user(mixed.outputs[0], "Transpose")
    last = swapped and _only_user(swapped.outputs[0], "Reshape")
    scaled = scores and _up(scores.inputs[0], "Mul")
    if scores is None or mixed is None or last is None or scaled is None:
        return None
    q = _up(scaled.inputs[0], "Squeeze", "Slice")
    k = _up(scores.inputs[1], "Transpose", "Squeeze", "Slice")
    v = _up(mixed.inputs[1], "Squeeze", "Slice")
    if q is None or k is None or v is None or not q.inputs[0] is k.inputs[0] is v.inputs[0]:
        return None
    view = _up(q.inputs[0], "Transpose", "Reshape")  # to [B, N, 3, H, K], then [3, B, H, N, K]
    biased = view and _up(view.inputs[0], "Add")
    product = biased and _up(biased.inputs[0], "MatMul")
    if view is None or biased is None or product is None:
        return None
    shape, factor = constant(view.inputs[1]), constant(scaled.inputs[1])
    starts = [constant(part.inputs[1]) for part in (q, k, v)]
    weight, (x, bias) = constant(product.inputs[1]), (product.inputs[0], biased.inputs[1])
    if weight is None or shape is None or factor is None or x is None or bias is None:
        return None
    heads, width = int(shape[-2]), int(shape[-1])
    usual = math.isclose(float(factor), width**-0.5, rel_tol=1e-5)
    if not usual or [None if n is None else int(n.item()) for n in starts] != [0, 1, 2]:
        return None
    return Attention(x, weight, bias, heads, add is not None, last, str(product.name))


def _fuse_attention(graph: ir.Graph, found: Attention, limit: int) -> None:
    """Projection, scores, softmax and mixing -> one QAttention on codes of the call's range."""
    integers, scale = quantize_weight(found.weight, limit)
    dynamic = ir.node("DynamicQuantizeLinear", [found.x], num_outputs=3)
    fuse_attention(graph, found, integers, scale, dynamic, *dynamic.outputs)


def fuse_attention(
    graph: ir.Graph,
    found: Attention,
    integers: np.ndarray,
    scale: np.ndarray,
    rounding: ir.Node,
    codes: ir.Value,
    step: ir.Value,
    zero: ir.Value,
) -> None:
    """Attention -> QAttention: `rounding` gives codes [B, N, D] of `step` and `zero`; the weight is
    int8 [D, 3 * H * K] with one scale per column."""
    inputs = [
        codes,
        initializer(graph, integers, f"{found.name}_int8"),
        found.bias,
        step,
        initializer(graph, scale, f"{found.name}_scale"),
        None,
        zero,
    ]
    attributes = {"num_heads": found.heads, "unidirectional": int(found.causal)}
    attention = ir.node("QAttention", inputs, attributes, domain=CONTRIB)
    replace(graph, found.last, [rounding, attention])


def _quantize_matmul(graph: ir.Graph, node: ir.Node, limit: int) -> None:
    """MatMul or Gemm with a constant matrix, and its bias -> DynamicQuantizeMatMul."""
    operand = node.inputs[1]
    matrix = constant(operand)
    if operand is None or matrix is None or matrix.ndim != 2:
        return
    if node.op_type == "Gemm":
        transposed = node.attributes["transB"].as_int() if "transB" in node.attributes else 0
        matrix = matrix.T if transposed else matrix
    integers, scale = quantize_weight(matrix, limit)
    inputs = [
        node.inputs[0],
        initializer(graph, integers, f"{operand.name}_int8"),
        initializer(graph, scale, f"{operand.name}_scale"),
    ]
    last, bias = bias_of(node)
    if bias is not None:
        inputs += [None, bias]
    replace(graph, last, [ir.node("DynamicQuantizeMatMul", inputs, domain=CONTRIB)])


def bias_of(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The last node of a linear layer, and its bias: Gemm's own, or of an Add that follows."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node, node.inputs[2]
    add = _only_user(node.outputs[0], "Add")
    if add is not None and add.inputs[0] is node.outputs[0]:
        vector, columns = constant(add.inputs[1]), node.inputs[1]
        wide = None if columns is None or columns.shape is None else set(columns.shape.numpy())
        if vector is not None and vector.ndim == 1 and wide and len(vector) in wide:
            return add, add.inputs[1]
    return node, None


def _quantize_table(graph: ir.Graph, node: ir.Node) -> None:
    """Gather of rows from a float table [V, D] -> int8 table, one scale a row.

    Written out rather than as DequantizeLinear, which would be folded back to floats on load.
    """
    table = constant(node.inputs[0])
    indices = node.inputs[1]
    if (
        table is None
        or table.ndim != 2
        or table.dtype != np.float32
        or constant(indices) is not None
    ):
        return
    integers, scale = quantize_weight(table.T)
    name = f"{node.name}_table"
    rows = ir.node("Gather", [initializer(graph, integers.T.copy(), f"{name}_int8"), indices])
    scales = ir.node("Gather", [initializer(graph, scale[:, None], f"{name}_scale"), indices])
    floats = ir.node("Cast", rows.outputs, {"to": ir.DataType.FLOAT})
    product = ir.node("Mul", [floats.outputs[0], scales.outputs[0]])
    replace(graph, node, [rows, scales, floats, product])


def _is_causal(mask: np.ndarray) -> bool:
    """Exactly 0 on and below the diagonal, far below 0 above it."""
    above = np.triu(np.ones_like(mask, dtype=bool), 1)
    return bool((mask[~above] == 0).all() and (mask[above] <= -1e3).all())


def _up(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The last node on the way back through first inputs, if the way has exactly these types."""
    node = None
    for op_type in op_types:
        node = None if value is None else value.producer()
        if node is None or node.op_type != op_type:
            return None
        value = node.inputs[0]
    return node


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = list(value.uses())
    return users[0].node if len(users) == 1 and users[0].node.op_type == op_type else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def initializer(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """A new initializer of the graph; a number is added to a name that is taken."""
    taken = (f"{name}_{n}" for n in itertools.count(2))
    while name in graph.initializers:
        name = next(taken)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
    value.shape = ir.Shape(array.shape)
    graph.initializers[name] = value
    return value


def replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put `new` where `old` stands; its single output takes the name and the users of the old."""
    graph.insert_before(old, new)
    output, result = old.outputs[0], new[-1].outputs[0]
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, result.type, result.shape = output.name, output.type, output.shape
    output.name = None
    graph.remove(old, safe=True)


def remove_unused(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
