"""Which layer of an ONNX graph is the first to leave the torch model: where a failed gate begins.

Layers are found by their values: in the float graph the one tensor that equals a torch module's
output bears a name, and graphs made from it keep the names.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Sums of thousands of floats in another order.
SAME = 1e-3


def first_diverging(
    module: nn.Module, row: Tensor, plain: Any, changed: Any, min_cosine: float
) -> str:
    """The layer where `changed` falls below `min_cosine`, as the end of a sentence.

    module: the torch tower; row: one input [1, ...]; plain: its float graph (onnx.ModelProto);
    changed: the graph that failed.
    """
    wanted = outputs(module, row)
    names = matches(wanted, run_all(plain, row))
    values = run_all(changed, row)
    for layer, name in names.items():
        if name in values and _cosine(values[name], wanted[layer]) < min_cosine:
            cosine = _cosine(values[name], wanted[layer])
            return f"; the first layer below it is {layer} (cosine {cosine:.5f})"
    layers = list(wanted)
    after = max((layers.index(layer) + 1 for layer in names), default=0)
    if after < len(layers):
        return f"; the first layer that the float graph lacks is {layers[after]}"
    return "; no single layer falls below it: the error builds up"


@torch.no_grad()
def outputs(module: nn.Module, row: Tensor) -> dict[str, np.ndarray]:
    """Output of every submodule that gives one tensor, in the order in which they finish."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                found[name] = output.detach().float().numpy()

        return hook

    named = [(name, child) for name, child in module.named_modules() if name]
    handles = [child.register_forward_hook(keep(name)) for name, child in named]
    try:
        module(row)
    finally:
        for handle in handles:
            handle.remove()
    return found


def run_all(model: Any, row: Tensor) -> dict[str, np.ndarray]:
    """Every floating-point tensor that a graph computes for one input, by name."""
    import onnx
    import onnxruntime

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    known = {value.name for value in probed.graph.output}
    for node in probed.graph.node:
        probed.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name)
            for name in node.output
            if name and name not in known
        )
    options = onnxruntime.SessionOptions()
    # Fusion would remove the very tensors that are asked for.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    feed = {session.get_inputs()[0].name: row.numpy()}
    found = dict(zip(names, session.run(names, feed)))
    return {name: value for name, value in found.items() if value.dtype.kind == "f"}


def matches(wanted: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> dict[str, str]:
    """Layer -> name of the tensor that equals its output, in any shape."""
    found = {}
    for layer, output in wanted.items():
        bound = SAME * max(1e-6, float(np.abs(output).max()))
        for name, value in values.items():
            if value.size == output.size and np.abs(value.ravel() - output.ravel()).max() < bound:
                found[layer] = name
                break
    return found


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / max(1e-30, float(np.linalg.norm(a) * np.linalg.norm(b))))
