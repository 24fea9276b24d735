"""Realises a model's quantization scheme in the ONNX graph of its float twin.

Static layers become QuantizeLinear/DequantizeLinear pairs, which ONNX Runtime, OpenVINO and
TensorRT fuse into integer kernels; dynamic ones ONNX Runtime's own operators; weight-only ones
MatMulNBits. Layers are found by their weights, which the twin carries on their grid. What a runtime
has no kernel for is snapped to the nearest thing that it has, and named in `bundle.json`.

Shapes: D input width, O output width, V rows of the token table.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from compress.clip import Clip
from compress.nn.fake import ActRounding, RoundedEmbedding, RoundedLinear
from compress.scheme import LayerScheme
from compress.twin import Rounded, rounded_layers
from export import _attention, _int8, _narrow, _nbits, _surgery
from export._snap import Runtime, nearest


@dataclass(frozen=True)
class Layer:
    """A rounded layer as a graph needs it."""

    name: str
    entry: LayerScheme
    codes: np.ndarray
    """[D, O], or [V, D] of a table: int8, or uint8 where the zero point isn't 0."""
    scale: np.ndarray
    """float32 [O, G] ([V, 1] of a table)."""
    zero: np.ndarray
    """Of the codes' type, [O, G]."""
    act: tuple[float, int, bool] | None
    """Scale, zero point and signedness of a static input."""
    beside: tuple[np.ndarray, np.ndarray] | None = None
    """Inputs [K] that are multiplied in float beside the integers, and their weights [K, O]."""


@torch.no_grad()
def realise(model: Any, clip: Clip, tower: str, runtime: Runtime) -> tuple[Any, dict[str, str]]:
    """The float twin's onnx.ModelProto of one tower -> the same with integers, and what isn't.

    The second result names each layer that this runtime computes otherwise than the scheme says,
    with what it does instead.
    """
    scheme = clip.model.config.scheme
    assert scheme is not None
    if not scheme.layers:
        # OpenVINO makes halves itself, when it saves the file.
        half = scheme.rest == "float16" and runtime == "onnxruntime"
        return (_narrow.half(model) if half else model), {}
    layers, notes = _snapped(clip, tower, runtime)
    by_weight = {_key(floats): layer for floats, layer in layers}
    graph_model = ir.from_proto(model)
    graph = graph_model.graph
    for node in list(graph):
        if node.op_type == "Conv":
            _int8.patches_to_matmul(graph, node)
    missing = {layer.name for _, layer in layers}
    if runtime == "onnxruntime":
        missing -= _attentions_(graph, by_weight)
    for node in list(graph):
        layer = _layer_of(node, by_weight)
        if layer is not None:
            _realise_(graph, node, layer, runtime)
            missing.discard(layer.name)
    notes |= dict.fromkeys(sorted(missing), "not found in the graph, computed in float")
    _surgery.remove_unused(graph)
    graph.opset_imports[_int8.CONTRIB] = 1
    return ir.to_proto(graph_model), notes


def _snapped(
    clip: Clip, tower: str, runtime: Runtime
) -> tuple[list[tuple[np.ndarray, Layer]], dict[str, str]]:
    """(float weight as it stands in the graph, layer as it can run), and what had to change."""
    scheme = clip.model.config.scheme
    assert scheme is not None
    modules = rounded_layers(clip.model)
    layers, notes = [], {}
    for name, asked in scheme.layers.items():
        if name.split(".")[0] != tower:
            continue
        entry = nearest(asked, name, runtime)
        if entry.model_dump(exclude={"equalized"}) != asked.model_dump(exclude={"equalized"}):
            notes[name] = f"asked {asked.label} {asked.act}, runs {entry.label} {entry.act}"
        if name in modules and entry.weight_bits is not None:
            layers.append(_read(name, entry, asked, modules[name]))
    return layers, notes


def _read(
    name: str, entry: LayerScheme, asked: LayerScheme, module: Rounded
) -> tuple[np.ndarray, Layer]:
    assert module.codes is not None
    signed = asked.weight_symmetric
    kind = np.int8 if signed else np.uint8
    weight, columns = module.weight, tuple[int, ...]()
    if isinstance(module, RoundedLinear) and module.float_columns:
        columns = module.float_columns
        weight = weight.index_fill(1, module.beside(), 0)
    codes = module.codes.codes(weight).numpy(force=True).astype(kind)  # [O, D]
    floats = module.rounded_weight().flatten(1).numpy(force=True)
    scale = module.codes.scale.view(len(codes), -1).numpy(force=True)
    zero = module.codes.zero.view(len(codes), -1).numpy(force=True).astype(kind)
    act = None
    if not isinstance(module, RoundedEmbedding) and entry.act_bits and entry.act == "static":
        assert isinstance(module.input, ActRounding)
        act = _eight_bits(module.input)
    if not isinstance(module, RoundedEmbedding):
        codes, floats = codes.T, floats.T
    beside = (np.array(columns), floats[list(columns)].copy()) if columns else None
    layer = Layer(name, entry, np.ascontiguousarray(codes), scale, zero, act, beside)
    return np.ascontiguousarray(floats), layer


def _eight_bits(act: ActRounding) -> tuple[float, int, bool]:
    """A static range of any width in 8-bit codes; one of 8 bits keeps scale and zero point."""
    scale, zero = float(act.scale), float(act.zero)
    if act.bits == 8:
        return scale, int(zero), act.symmetric
    first, last = act.limits
    low, high = (first - zero) * scale, (last - zero) * scale
    if act.symmetric:
        return high / 127, 0, True
    wide = (high - low) / 255
    return wide, round(-low / wide), False


def _key(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, np.ascontiguousarray(array, dtype=np.float32).tobytes()


def _layer_of(node: ir.Node, by_weight: dict[Any, Layer]) -> Layer | None:
    if node.op_type not in ("MatMul", "Gemm", "Gather"):
        return None
    matrix = _surgery.constant(node.inputs[0 if node.op_type == "Gather" else 1])
    if matrix is None or matrix.ndim != 2:
        return None
    if node.op_type == "Gemm" and "transB" in node.attributes:
        matrix = matrix.T if node.attributes["transB"].as_int() else matrix
    return by_weight.get(_key(matrix))


def _realise_(graph: ir.Graph, node: ir.Node, layer: Layer, runtime: Runtime) -> None:
    if node.op_type == "Gather":
        _table_(graph, node, layer)
        return
    last, bias = _int8.bias_of(node)
    branch = _beside(graph, node, layer) if layer.beside else []
    if layer.entry.act_bits is None or layer.entry.weight_bits == 4:
        matrix = (layer.codes, layer.scale, layer.zero)
        integers = layer.entry.act_bits is not None
        nodes = [_nbits.node(graph, node.inputs[0], matrix, layer.name, integers)]
    elif layer.entry.act == "dynamic":
        nodes = _dynamic(graph, node, layer)
    elif runtime == "onnxruntime":
        nodes, bias = _fused(graph, node, layer, bias), None
    else:
        nodes = _static(graph, node, layer)
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias]))
    if branch:
        nodes += [*branch, ir.node("Add", [nodes[-1].outputs[0], branch[-1].outputs[0]])]
    _surgery.replace(graph, last, nodes)


def _beside(graph: ir.Graph, node: ir.Node, layer: Layer) -> list[ir.Node]:
    """The product of the float columns; where the kernel finds its range it must not see them.

    Elsewhere they are clipped, and the integers' weight is 0 there.
    """
    assert layer.beside is not None
    columns, matrix = layer.beside
    x = node.inputs[0]
    picked = ir.node(
        "Gather", [x, _surgery.initializer(graph, columns, f"{layer.name}.columns")], {"axis": -1}
    )
    weight = _surgery.initializer(graph, matrix, f"{layer.name}.columns_weight")
    product = ir.node("MatMul", [picked.outputs[0], weight])
    if layer.entry.act == "dynamic" and layer.entry.act_bits:
        kept = np.ones(len(layer.codes), np.float32)
        kept[columns] = 0
        rest = ir.node("Mul", [x, _surgery.initializer(graph, kept, f"{layer.name}.rest")])
        graph.insert_before(node, rest)
        node.replace_input_with(0, rest.outputs[0])
    return [picked, product]


def _attentions_(graph: ir.Graph, by_weight: dict[Any, Layer]) -> set[str]:
    """Fuse whole attentions whose projection has 8-bit weights and inputs -> those projections."""
    fused = set()
    for node in list(graph):
        found = _attention.find(node) if node.op_type == "Softmax" else None
        layer = by_weight.get(_key(found.weight)) if found else None
        if found is None or found.added is not None:
            continue
        if layer is None or layer.entry.label not in ("w8a8", "w7a8"):
            continue
        if layer.zero.any() or layer.scale.shape[1] > 1:
            continue
        if layer.act is None:
            rounding = ir.node("DynamicQuantizeLinear", [found.x], num_outputs=3)
            numbers = rounding.outputs
        else:
            scale, point = _input_numbers(graph, layer, unsigned=True)
            rounding = ir.node("QuantizeLinear", [found.x, scale, point])
            numbers = (rounding.outputs[0], scale, point)
        per_column = layer.scale[:, 0].copy()
        _int8.fuse_attention(graph, found, layer.codes, per_column, rounding, *numbers)
        fused.add(layer.name)
    return fused


def _input_numbers(
    graph: ir.Graph, layer: Layer, unsigned: bool = False
) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of a static input; QAttention takes unsigned codes only."""
    assert layer.act is not None
    step, zero, signed = layer.act
    scale = np.array(step, dtype=np.float32)
    if signed and unsigned:
        zero, signed = zero + 128, False
    point = np.array(zero, dtype=np.int8 if signed else np.uint8)
    return (
        _surgery.initializer(graph, scale, f"{layer.name}.input_scale"),
        _surgery.initializer(graph, point, f"{layer.name}.input_zero"),
    )


def _static(graph: ir.Graph, node: ir.Node, layer: Layer) -> list[ir.Node]:
    """Quantize and dequantize around a MatMul, the form that OpenVINO fuses."""
    name, x = layer.name, node.inputs[0]
    scale, point = _input_numbers(graph, layer)
    rounded = ir.node("QuantizeLinear", [x, scale, point])
    back = ir.node("DequantizeLinear", [rounded.outputs[0], scale, point])
    integers = _surgery.initializer(graph, layer.codes, f"{name}.weight")
    per_column = _surgery.initializer(graph, layer.scale[:, 0].copy(), f"{name}.weight_scale")
    zeros = _surgery.initializer(graph, layer.zero[:, 0].copy(), f"{name}.weight_zero")
    matrix = ir.node("DequantizeLinear", [integers, per_column, zeros], {"axis": 1})
    product = ir.node("MatMul", [back.outputs[0], matrix.outputs[0]])
    return [rounded, back, matrix, product]


def _fused(graph: ir.Graph, node: ir.Node, layer: Layer, bias: ir.Value | None) -> list[ir.Node]:
    """The product of a rounded input and integers, with its bias, in one operator.

    From a MatMul between quantize and dequantize, ONNX Runtime 1.31 makes a Gemm with its bias
    first, which it then computes in float, on weights that it dequantizes in every call.
    """
    name = layer.name
    scale, point = _input_numbers(graph, layer)
    rounded = ir.node("QuantizeLinear", [node.inputs[0], scale, point])
    integers = _surgery.initializer(graph, layer.codes, f"{name}.weight")
    per_column = _surgery.initializer(graph, layer.scale[:, 0].copy(), f"{name}.weight_scale")
    zeros = None
    if layer.zero.any():
        zeros = _surgery.initializer(graph, layer.zero[:, 0].copy(), f"{name}.weight_zero")
    inputs = [rounded.outputs[0], integers, scale, per_column, point, zeros, bias]
    return [rounded, ir.node("MatMulIntegerToFloat", inputs, domain=_int8.CONTRIB)]


def _dynamic(graph: ir.Graph, node: ir.Node, layer: Layer) -> list[ir.Node]:
    inputs = [
        node.inputs[0],
        _surgery.initializer(graph, layer.codes, f"{layer.name}.weight"),
        _surgery.initializer(graph, layer.scale[:, 0].copy(), f"{layer.name}.weight_scale"),
    ]
    if layer.zero.any():
        inputs.append(
            _surgery.initializer(graph, layer.zero[:, 0].copy(), f"{layer.name}.weight_zero")
        )
    return [ir.node("DynamicQuantizeMatMul", inputs, domain=_int8.CONTRIB)]


def _table_(graph: ir.Graph, node: ir.Node, layer: Layer) -> None:
    """Rows of integers, each with its scale; written out, as DequantizeLinear would be folded."""
    name, indices = layer.name, node.inputs[1]
    codes = layer.codes.astype(np.int16) - layer.zero.astype(np.int16)
    kind = np.int8 if codes.min() >= -128 and codes.max() < 128 else np.int16
    rows = ir.node(
        "Gather", [_surgery.initializer(graph, codes.astype(kind), f"{name}.codes"), indices]
    )
    scales = ir.node("Gather", [_surgery.initializer(graph, layer.scale, f"{name}.scale"), indices])
    floats = ir.node("Cast", rows.outputs, {"to": ir.DataType.FLOAT})
    product = ir.node("Mul", [floats.outputs[0], scales.outputs[0]])
    _surgery.replace(graph, node, [rows, scales, floats, product])
