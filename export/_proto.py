"""What torch's exporter gives, made fit to ship: constants folded, notes dropped, checked.

Weights are held as few times as can be: a text tower's table may be most of a model.
"""

from typing import Any

import numpy as np

from compress.errors import GateFailed

# One protobuf message holds 2 GB; larger weights go to a file beside the graph.
EMBED_LIMIT_BYTES = 1_900_000_000
# No tensor that says a shape is larger.
SHAPE_BYTES = 1024


def finished(program: Any, tower: str) -> Any:
    """onnx.ModelProto of an exported torch.onnx.ONNXProgram, which is of no use afterwards.

    Raises GateFailed for weights that are not finite, and onnx's own errors for a broken graph.
    """
    import onnx

    _fold_weights(program)
    model = program.model_proto
    _tidy(model)
    _finite(model, tower)
    onnx.checker.check_model(skeleton(model), full_check=True)
    return model


def fits_one_message(model: Any) -> bool:
    """Whether the graph can be one message with its weights in it."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer) < EMBED_LIMIT_BYTES


def skeleton(model: Any) -> Any:
    """The graph with inputs in place of its weights: the checker would hold them three times."""
    import onnx

    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = bare.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    bare.functions.extend(model.functions)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= SHAPE_BYTES:  # shapes follow from it
            graph.initializer.append(tensor)
        else:
            kind = (tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(onnx.helper.make_tensor_value_info(*kind))
    return bare


def _fold_weights(program: Any) -> None:
    """Compute what follows from weights alone; torch does so only for small ones."""
    from onnxscript import optimizer

    optimizer.fold_constants(
        program.model,
        onnx_shape_inference=False,
        input_size_limit=EMBED_LIMIT_BYTES,
        output_size_limit=EMBED_LIMIT_BYTES,
    )
    optimizer.remove_unused_nodes(program.model)


def _tidy(model: Any) -> None:
    """Drop the exporter's notes: source paths and module names help nobody who runs the file."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for entry in (*model.graph.node, *model.graph.initializer, *model.graph.input):
        entry.doc_string = ""
        del entry.metadata_props[:]


def _finite(model: Any, tower: str) -> None:
    """Infinities become NaN in half precision and ruin the ranges of integer graphs."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise GateFailed(f"{tower} tower: {tensor.name} holds NaN or infinity")
