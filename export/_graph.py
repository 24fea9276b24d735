"""ONNX nodes put in front of a graph, and taken away again: what a tower's input is made from.

Every node and constant of such a part has a name that begins with its prefix, so that the tower
alone can be had from a file that takes pictures or texts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

CONTRIB = "ai.onnx.contrib"
"""The domain of onnxruntime-extensions."""


class Part:
    """Nodes and constants while they are collected."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(
        self, kind: str, *inputs: str, out: str | None = None, domain: str = "", **settings: Any
    ) -> str:
        """One node -> the name of its first output; `out` names it, and may end the part."""
        from onnx import helper

        name = f"{self.prefix}/{len(self.nodes)}"
        outputs = [out or f"{name}/{kind}"]
        node = helper.make_node(kind, inputs, outputs, name=name, domain=domain, **settings)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, value: Any, dtype: Any = np.float64) -> str:
        """A constant tensor -> its name."""
        from onnx import numpy_helper

        name = f"{self.prefix}/constant{len(self.constants)}"
        array = np.array(value, dtype=dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name


def attach_(model: Any, part: Part, name: str, dtype: int, shape: Sequence[int | None]) -> None:
    """Let a graph of one input take what `part` reads instead, in place; its last output is that
    input's name. `dtype` and `shape` are those of the new input `name`."""
    from onnx import helper

    graph = model.graph
    nodes = [type(node).FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend([*part.nodes, *nodes])
    graph.initializer.extend(part.constants)
    graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
    domains = {entry.domain for entry in model.opset_import}
    for domain in {node.domain for node in part.nodes} - domains - {""}:
        model.opset_import.append(helper.make_opsetid(domain, 1))


def detach(model: Any, prefixes: Sequence[str], name: str, shape: Sequence[int]) -> Any:
    """The graph behind such parts, with its float pixels or int32 ids as input again."""
    from onnx import TensorProto, helper

    bare = type(model).FromString(model.SerializeToString())
    graph, starts = bare.graph, tuple(f"{prefix}/" for prefix in prefixes)
    for field in (graph.node, graph.initializer):
        kept = [
            type(entry).FromString(entry.SerializeToString())
            for entry in field
            if not entry.name.startswith(starts)
        ]
        del field[:]
        field.extend(kept)
    dtype = TensorProto.FLOAT if len(shape) == 4 else TensorProto.INT32
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
    return bare
