"""The precision of each layer, read from an artifact's own file rather than from its settings.

Graphs forget the names of layers, but keep their order: the n-th operator that holds weights is the
n-th layer of the tower. Where the numbers differ (layers were fused or split), the operators' own
order is all there is, and they are numbered.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.clip import Clip
from export import _verify

Layer = dict[str, Any]

HOLDERS = {"Conv", "ConvInteger", "QLinearConv", "MatMul", "Gemm", "MatMulInteger", "QGemm"}
HOLDERS |= {"DynamicQuantizeMatMul", "QAttention", "Attention", "MatMulNBits", "QLinearMatMul"}
HOLDERS |= {"MatMulIntegerToFloat", "FusedMatMul", "FusedGemm", "Gather", "Convolution"}
HOLDERS |= {"DynamicQuantizeLSTM", "GroupConvolution"}
PASSED_THROUGH = {"DequantizeLinear", "Transpose", "Cast", "Reshape", "QuantizeLinear"}
PASSED_THROUGH |= {"Convert", "Multiply", "Subtract", "FakeQuantize", "FakeConvert"}
SMALLEST = 256
"""Values below which a constant is a shape or a position, not a layer's weight."""
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4}


def layers(folder: Path, tower: str, clip: Clip) -> list[Layer] | None:
    """`name`, `dtype`, `bits` and `num_weights` of each layer; None for a format we can't read.

    `clip` is the model that the files were made from: it knows the layers' names.
    """
    path = folder / _verify.read(folder)[tower]["file"]
    if path.suffix == ".onnx":
        found = list(_of_onnx(path))
    elif path.suffix == ".xml":
        found = list(_of_openvino(path))
    else:
        return None
    names = layer_names(clip, tower)
    if len(names) != len(found):
        names = [f"operator {n + 1}" for n in range(len(found))]
    return [
        {"name": name, "dtype": dtype, "bits": BITS.get(dtype), "num_weights": size}
        for name, (dtype, size) in zip(names, found)
    ]


def layer_names(clip: Clip, tower: str) -> list[str]:
    """The layers that hold a matrix, in the order in which data flows through them."""
    model = getattr(clip.model, tower)
    wanted = ("Linear", "Conv2d", "Embedding")
    return [name for name, part in model.named_modules() if type(part).__name__ in wanted]


def _of_onnx(path: Path) -> Iterator[tuple[str, int]]:
    """(dtype, number of weights) of each node that holds weights, in the graph's order."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    name_of = onnx.TensorProto.DataType.Name
    short = {"FLOAT": "float32"}
    for node in graph.node:
        if node.op_type not in HOLDERS:
            continue
        for name in node.input:
            while name in makers and makers[name].op_type in PASSED_THROUGH:
                name = makers[name].input[0]
            tensor = constants.get(name)
            if tensor is not None and (size := _num_weights(list(tensor.dims))):
                kind = name_of(tensor.data_type)
                bits = next((a.i for a in node.attribute if a.name == "bits"), 8)
                packed = node.op_type == "MatMulNBits"
                yield (f"int{bits}" if packed else short.get(kind, kind.lower())), size
                break


def _of_openvino(path: Path) -> Iterator[tuple[str, int]]:
    import openvino

    kinds = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8"}
    kinds |= {"i4": "int4", "u4": "uint4"}
    for node in openvino.Core().read_model(str(path)).get_ordered_ops():
        if node.get_type_name() not in HOLDERS:
            continue
        for place in node.inputs():
            source = place.get_source_output().get_node()
            while source.get_type_name() in PASSED_THROUGH:
                source = source.input(0).get_source_output().get_node()
            is_constant = source.get_type_name() == "Constant"
            if is_constant and (size := _num_weights(list(source.shape))):
                kind = source.get_element_type().get_type_name()
                yield kinds.get(kind, kind), size
                break


def _num_weights(shape: list[int]) -> int:
    """Values of a constant that is a matrix or more; 0 for shapes, positions and scales."""
    size = math.prod(shape)
    return size if size >= SMALLEST and sum(side > 1 for side in shape) > 1 else 0
