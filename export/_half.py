"""Rewrites a float32 ONNX graph for strongly typed runtimes: half precision, where that is safe.

Such runtimes add no casts of their own. Layer norms and the final L2 normalisation stay float32
between two casts, as squares overflow in half precision and sums of them lose their small terms.
Inputs and outputs of the graph keep their types.
"""

from typing import Any

import numpy as np

from compress.errors import GateFailed

WHOLE = frozenset(
    ("LayerNormalization", "ReduceL2", "ReduceMean", "ReduceSum", "Sqrt", "Pow", "Div")
)
"""Operators that stay float32."""
FOLLOW = frozenset(("Clip", "Expand", "Identity", "Squeeze", "Unsqueeze"))
"""Operators that stay float32 where their input is."""


def rewrite(model: Any) -> Any:
    """onnx.ModelProto with float32 inside -> the same graph in float16.

    Raises GateFailed for a weight that half precision cannot hold.
    """
    import onnx

    typed = onnx.shape_inference.infer_shapes(model)
    values = (*typed.graph.value_info, *typed.graph.input, *typed.graph.output)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return _Halved(typed, floats).model


class _Halved:
    """The graph while it is rewritten: which tensors are float32, which casts exist."""

    def __init__(self, model: Any, floats: set[str]) -> None:
        import onnx

        self.onnx, self.model, self.floats = onnx, model, floats
        graph = model.graph
        self.weights = {
            t.name: t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT
        }
        self.whole = {value.name for value in graph.input} & floats
        self.made: set[str] = set()
        self.nodes: list[Any] = []
        self.constants = [t for t in graph.initializer if t.name not in self.weights]
        for node in list(graph.node):
            self._rewrite(node)
        for value in graph.output:
            if value.name in floats - self.whole:
                self._cast_output(value.name)
        self._put(graph.node, self.nodes)
        self._put(graph.initializer, self.constants)
        del graph.value_info[:]

    def _rewrite(self, node: Any) -> None:
        """One node with its inputs in the type that it computes in."""
        inputs = [name for name in node.input if name in self.floats]
        follows = node.op_type in FOLLOW and bool(inputs) and self.whole.issuperset(inputs)
        makes = not inputs and not any(name in self.weights for name in node.input)
        whole = node.op_type in WHOLE or follows or (makes and node.op_type != "Cast")
        if node.op_type == "Cast" and not whole and node.output[0] in self.floats:
            [target] = [a for a in node.attribute if a.name == "to"]
            target.i = self.onnx.TensorProto.FLOAT16
        node.input[:] = [self._as(name, whole) for name in node.input]
        self.nodes.append(node)
        if whole:
            self.whole.update(name for name in node.output if name in self.floats)

    def _as(self, name: str, whole: bool) -> str:
        """The tensor in float32 or in half precision, by a cast if it isn't."""
        if name in self.weights:
            return self._weight(name, whole)
        if name not in self.floats or (name in self.whole) == whole:
            return name
        cast = f"{name}_{'whole' if whole else 'half'}"
        if cast not in self.made:
            self.made.add(cast)
            self.nodes.append(self._cast(name, cast, whole))
        return cast

    def _weight(self, name: str, whole: bool) -> str:
        stored = f"{name}_whole" if whole else name
        if stored not in self.made:
            self.made.add(stored)
            values = self.onnx.numpy_helper.to_array(self.weights[name])
            if not whole:
                if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
                    raise GateFailed(f"{name} holds values that half precision cannot")
                values = values.astype(np.float16)
            self.constants.append(self.onnx.numpy_helper.from_array(values, stored))
        return stored

    def _cast(self, name: str, output: str, whole: bool) -> Any:
        kind = self.onnx.TensorProto.FLOAT if whole else self.onnx.TensorProto.FLOAT16
        return self.onnx.helper.make_node("Cast", [name], [output], to=kind)

    def _cast_output(self, name: str) -> None:
        """An output of the graph that a node gives in half precision."""
        half = f"{name}_half"
        for node in self.nodes:
            node.input[:] = [half if other == name else other for other in node.input]
            node.output[:] = [half if other == name else other for other in node.output]
        self.nodes.append(self._cast(half, name, whole=True))

    @staticmethod
    def _put(field: Any, messages: list[Any]) -> None:
        copies = [type(message).FromString(message.SerializeToString()) for message in messages]
        del field[:]
        field.extend(copies)
