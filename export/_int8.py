"""Rewrites a float ONNX graph into ONNX Runtime's int8 operators.

Weights get one scale per output column, activations one scale per call, found while running. What
is fused and why was measured: batch 1, one thread, 65 tokens of width 128 (x86 with VNNI).
DynamicQuantizeMatMul beat static QDQ, MatMulIntegerToFloat and QGemm; QAttention beat the written
out attention by 10 %; SkipLayerNormalization is left out, as it cost 30 %.

Shapes: D input width of a layer, O output width, V rows of the token table, N tokens,
H heads, K head width.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from export import _attention
from export._attention import Attention
from export._surgery import constant, initializer, only_user, remove_unused, replace

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
        found = _attention.find(node) if node.op_type == "Softmax" else None
        if found and found.added is None:
            _fuse_attention(graph, found, limit)
        elif found:
            _fuse_biased(graph, found, limit)
    for node in list(graph):
        if node.op_type in ("MatMul", "Gemm"):
            # Pixels of one sign are where 16 bits overflow first, wherever the file may go.
            _quantize_matmul(graph, node, REDUCED_RANGE if _reads_input(node) else limit)
        elif node.op_type == "Gather":
            _quantize_table(graph, node)
    remove_unused(graph)
    graph.opset_imports[CONTRIB] = 1
    return ir.to_proto(graph_model)


def patches_to_matmul(graph: ir.Graph, conv: ir.Node) -> None:
    """Conv over patches that don't overlap, flattened -> a MatMul, which has int8 kernels."""
    pixels, weight = conv.inputs[0], constant(conv.inputs[1])
    flat = only_user(conv.outputs[0], "Reshape")
    tokens = flat and only_user(flat.outputs[0], "Transpose")
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


def _fuse_biased(graph: ir.Graph, found: Attention, limit: int) -> None:
    """The same where keys have something added, which QAttention cannot: the projection in
    integers, then MultiHeadAttention in float."""
    integers, scale = quantize_weight(found.weight, limit)
    weights = [
        initializer(graph, array, f"{found.name}_{what}")
        for array, what in ((integers, "int8"), (scale, "scale"))
    ]
    product = ir.node(
        "DynamicQuantizeMatMul", [found.x, *weights, None, found.bias], domain=CONTRIB
    )
    parts = ir.node("Split", product.outputs, {"axis": 2, "num_outputs": 3}, num_outputs=3)
    # A row for each query, as the operator wants them.
    queries = np.zeros((found.tokens, 1), np.float32)
    square = ir.node("Add", [found.added, initializer(graph, queries, f"{found.name}_queries")])
    attention = ir.node(
        "MultiHeadAttention",
        [*parts.outputs, None, None, square.outputs[0]],
        {"num_heads": found.heads},
        domain=CONTRIB,
    )
    replace(graph, found.last, [product, parts, square, attention])


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


def _reads_input(node: ir.Node) -> bool:
    """Whether a layer multiplies the graph's input itself, in another shape at most."""
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type not in ("Reshape", "Transpose"):
            return False
        value = maker.inputs[0]
    return value is not None and value.is_graph_input()


def bias_of(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The last node of a linear layer, and its bias: Gemm's own, or of an Add that follows."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node, node.inputs[2]
    add = only_user(node.outputs[0], "Add")
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
