"""Finds written-out self-attention in an ONNX graph.

Shapes: B batch, D width of a layer, N tokens, H heads, K head width.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export._surgery import constant, only_user, up


@dataclass(frozen=True)
class Attention:
    """Written-out self-attention as found in a graph, between `x` and `last`."""

    x: ir.Value
    weight: np.ndarray
    """[D, 3 * H * K], q, k and v beside each other."""
    bias: ir.Value
    tokens: int
    heads: int
    causal: bool
    last: ir.Node
    name: str
    added: ir.Value | None = None
    """[B, 1, 1, N] added to all scores of a key, such as the log of a merged token's size."""


def find(softmax: ir.Node) -> Attention | None:
    """The self-attention around a Softmax, if it is scaled as usual, and causal, plain or with
    something computed for each key added to its scores."""
    add = up(softmax.inputs[0], "Add")
    mask = constant(add.inputs[1]) if add else None
    if mask is not None and not _is_causal(mask):
        return None
    scores = up(add.inputs[0] if add else softmax.inputs[0], "MatMul")
    mixed = only_user(softmax.outputs[0], "MatMul")
    swapped = mixed and only_user(mixed.outputs[0], "Transpose")
    last = swapped and only_user(swapped.outputs[0], "Reshape")
    scaled = scores and up(scores.inputs[0], "Mul")
    if scores is None or mixed is None or last is None or scaled is None:
        return None
    q = up(scaled.inputs[0], "Squeeze", "Slice")
    k = up(scores.inputs[1], "Transpose", "Squeeze", "Slice")
    v = up(mixed.inputs[1], "Squeeze", "Slice")
    if q is None or k is None or v is None or not q.inputs[0] is k.inputs[0] is v.inputs[0]:
        return None
    view = up(q.inputs[0], "Transpose", "Reshape")  # to [B, N, 3, H, K], then [3, B, H, N, K]
    biased = view and up(view.inputs[0], "Add")
    product = biased and up(biased.inputs[0], "MatMul")
    if view is None or biased is None or product is None:
        return None
    shape, factor = constant(view.inputs[1]), constant(scaled.inputs[1])
    starts = [constant(part.inputs[1]) for part in (q, k, v)]
    weight, (x, bias) = constant(product.inputs[1]), (product.inputs[0], biased.inputs[1])
    if weight is None or shape is None or factor is None or x is None or bias is None:
        return None
    added = add.inputs[1] if add and mask is None else None
    if added is not None and not _for_each_key(added):
        return None
    tokens, heads, width = int(shape[1]), int(shape[-2]), int(shape[-1])
    usual = math.isclose(float(factor), width**-0.5, rel_tol=1e-5)
    if not usual or [None if n is None else int(n.item()) for n in starts] != [0, 1, 2]:
        return None
    name = str(product.name)
    return Attention(x, weight, bias, tokens, heads, mask is not None, last, name, added)


def _is_causal(mask: np.ndarray) -> bool:
    """Exactly 0 on and below the diagonal, far below 0 above it."""
    above = np.triu(np.ones_like(mask, dtype=bool), 1)
    return bool((mask[~above] == 0).all() and (mask[above] <= -1e3).all())


def _for_each_key(added: ir.Value) -> bool:
    """Whether it is made as [B, 1, 1, N]."""
    node = added.producer()
    if node is None or node.op_type != "Unsqueeze":
        return False
    axes = constant(node.inputs[1])
    return axes is not None and axes.tolist() == [1, 2]
