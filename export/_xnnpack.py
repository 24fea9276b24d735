"""A tower in operators that XNNPACK runs, so that a whole tower becomes one delegated graph.

XNNPACK has no layer norm, and its mean is a pooling over four dimensions; but a mean is a product
with a constant column, which it runs as any linear layer. Shapes: D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WrittenNorm(nn.Module):
    """LayerNorm over the last dimension as two means, a product and a reciprocal root."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("column", torch.full((1, width), 1 / width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        column = self.get_buffer("column")
        centred = x - F.linear(x, column)
        variance = F.linear(centred * centred, column)
        scaled = centred * torch.rsqrt(variance + self.eps)
        scaled = scaled if self.weight is None else scaled * self.weight
        return scaled if self.bias is None else scaled + self.bias


def write_out_(module: nn.Module) -> nn.Module:
    """Replace every layer norm over one dimension inside a module, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm) and len(child.normalized_shape) == 1:
            setattr(module, name, WrittenNorm(child))
        else:
            write_out_(child)
    return module


def outside_norms(node: Any) -> bool:
    """Whether an operator of a traced graph belongs to no layer norm: these stay in float."""
    stack = node.meta.get("nn_module_stack") or {}
    return not any("WrittenNorm" in str(kind) for _, kind in stack.values())
