"""Layer-wise relevance propagation: how much of an output each input carries, rule by rule.

Rules of Chefer et al. (arXiv 2012.09838) with alpha = 1; each hands on all the relevance it gets,
but where a sum it divides by is zero. Relevance propagation is covered by patents of its inventors
(free for personal and scientific use, as the LXT authors state): ask before using it in a product.

Shapes: ... any leading dims, D input width, O output width.
"""

import torch
from torch import Tensor

SMALL = 1e-9


def linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """From a linear layer's output [..., O] to its input x [..., D], along positive products."""
    parts = ((x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0)))
    total = sum(a @ w.T for a, w in parts)
    assert isinstance(total, Tensor)
    share = divide(relevance, total)
    return parts[0][0] * (share @ parts[0][1]) + parts[1][0] * (share @ parts[1][1])


def product(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """From a @ b to both operands, half to each."""
    share = divide(relevance, a @ b)
    return a * (share @ b.transpose(-2, -1)) / 2, b * (a.transpose(-2, -1) @ share) / 2


def add(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """From a + b to both, by value, rescaled so that each gets the share of its absolute sum."""
    share = divide(relevance, a + b)
    parts = a * share, b * share
    sizes = [part.sum().abs() for part in parts]
    whole = relevance.sum()
    totals = [whole * size / (sizes[0] + sizes[1]).clamp(min=SMALL) for size in sizes]
    return divide(totals[0], parts[0].sum()) * parts[0], divide(totals[1], parts[1].sum()) * parts[
        1
    ]


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b with |b| at least SMALL, and 0 where b is 0."""
    safe = torch.where(b < 0, b.clamp(max=-SMALL), b.clamp(min=SMALL))
    return torch.where(b == 0, torch.zeros_like(safe), a / safe)
