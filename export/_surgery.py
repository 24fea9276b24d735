"""Changes to an ONNX graph in memory: constants read and added, nodes found and replaced."""

import itertools

import numpy as np
import onnx_ir as ir


def up(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The last node on the way back through first inputs, if the way has exactly these types."""
    node = None
    for op_type in op_types:
        node = None if value is None else value.producer()
        if node is None or node.op_type != op_type:
            return None
        value = node.inputs[0]
    return node


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is the only one and of this type."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and users[0].node.op_type == op_type else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What a value holds, where that is fixed."""
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
    """Remove nodes and initializers that nobody reads."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
