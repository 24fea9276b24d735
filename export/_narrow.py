"""ONNX Runtime's own rewrites of a float graph: half precision, fixed 8-bit ranges, 4-bit weights.

Each takes and gives an onnx.ModelProto of one tower; the dynamic 8-bit graph is `_int8`.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import PocketclipError

# The L2 norm squares its input: 65504, the largest half, is reached at a length of 256.
KEPT_FLOAT = ("ReduceL2", "LayerNormalization", "Softmax")
MATRICES = ("MatMul", "Gemm")
BLOCK = 32
"""Weights that share a 4-bit scale."""


def half(model: Any) -> Any:
    """Weights and arithmetic in float16, norms and softmax in float32, inputs and outputs as is.

    For GPUs; ONNX Runtime's CPU kernels compute in float32 around casts.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    own = scale_keys(_unshared(model))
    return convert_float_to_float16(own, keep_io_types=True, op_block_list=list(KEPT_FLOAT))


def scale_keys(model: Any) -> Any:
    """The model with attention's constant scale on the keys where it was on the queries.

    Scaled queries of one matrix product (timm's attention over feature maps, as in MobileCLIP's
    image towers) are a pattern that ONNX Runtime's AttentionFusion reads as float32: a file in
    half precision would not open at all.
    """
    made = type(model)()
    made.CopyFrom(model)
    makers = {name: node for node in made.graph.node for name in node.output}
    constants = {tensor.name for tensor in made.graph.initializer if not tensor.dims}
    read = Counter(name for node in made.graph.node for name in node.input)
    moved = {}
    for node in made.graph.node:
        scaled = makers.get(node.input[0]) if node.op_type == "MatMul" else None
        if scaled is None or scaled.op_type != "Mul" or scaled.input[1] not in constants:
            continue
        if read[scaled.output[0]] > 1:  # somebody else needs the scaled queries
            continue
        queries, keys = scaled.input[0], node.input[1]
        scaled.input[0], node.input[0], node.input[1] = keys, queries, scaled.output[0]
        moved[node.output[0]] = scaled
    _put_before(made, moved)
    return made


def _put_before(model: Any, moved: dict[str, Any]) -> None:
    """Nodes to where the maker of an output stands, as inputs have to be there before it."""
    graph, outputs = model.graph, {name for node in moved.values() for name in node.output}
    nodes = []
    for node in graph.node:
        if not outputs & set(node.output):
            nodes += [moved[name] for name in node.output if name in moved] + [node]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    shapes = [value for value in graph.value_info if value.name not in outputs]
    copies = [type(value).FromString(value.SerializeToString()) for value in shapes]
    del graph.value_info[:]
    graph.value_info.extend(copies)


def _unshared(model: Any) -> Any:
    """The model with constants of its own for each operator that stays float32.

    The converter casts an operator's constant and names the cast by the constant: two operators of
    one constant, as equal weights of an untrained model become, would get equal names.
    """
    made = type(model)()
    made.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    taken = set()
    for number, node in enumerate(n for n in made.graph.node if n.op_type in KEPT_FLOAT):
        for place, name in enumerate(node.input):
            if name in taken:
                copy = made.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[place] = f"{name}.{number}"
            elif name in constants:
                taken.add(name)
    return made


def static(model: Any, rows: list[np.ndarray], reduce_range: bool) -> Any:
    """Symmetric int8 QDQ around every product with constant weights, ranges from `rows`.

    rows: inputs of one call each. Weights have a scale per output column. Products of two
    activations stay float, as quantizing all operators ruins text towers, and so do those with a
    matrix for each head, for which there is no integer kernel with a scale per column.
    """
    from onnxruntime import quantization

    logging.getLogger().addFilter(_unwanted)
    options = {"ActivationSymmetric": True, "WeightSymmetric": True}
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    others = [n.name for n in products if not matrices & set(n.input)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "static.onnx"
        quantization.quantize_static(
            model,
            path,
            _reader(model.graph.input[0].name, rows),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=[*MATRICES, "Conv"],
            nodes_to_exclude=others,
            per_channel=True,
            reduce_range=reduce_range,
            extra_options=options,
        )
        return _read(path)


def four_bits(model: Any) -> Any:
    """Constant matrices in 4 bits, a scale per 32 weights; the products are computed in 8 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    widths = [w.dims for w in model.graph.initializer if len(w.dims) == 2]
    if not any(width[0] >= BLOCK for width in widths):
        raise PocketclipError(f"int4: no matrix has {BLOCK} rows to share a scale; choose int8")
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    rewriting = MatMulNBitsQuantizer(
        model,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=4,
        op_types_to_quantize=("MatMul",),
    )
    rewriting.process()
    return rewriting.model.model


def _reader(name: str, rows: list[np.ndarray]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Rows(CalibrationDataReader):
        """Hands out one call's input after the other."""

        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(rows)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.left, None)
            return None if row is None else {name: row}

    return Rows()


def _read(path: Path) -> Any:
    import onnx

    return onnx.load(path)


def _unwanted(record: logging.LogRecord) -> bool:
    """Whether a log line is shown: not the advice to run a step that changes nothing here."""
    return "pre-processing before quantization" not in record.getMessage()
