"""Equivalences: what a linear layer's input is divided by goes into its weight, exactly.

x / factor + shift enters a layer of weight W * factor and bias b - W' shift. The layer before it (a
layer norm, or the value projection) takes over the division. Shapes: D channels, O outputs, M rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compress.nn.quant import TINY, code_limits

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RHOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Channels whose reach is below this share of the mean would be blown up without use.
LEAST_REACH = 1e-2
# Whiskers of a box plot, in which the reach of a channel is kept (our formulation).
WHISKERS = 1.5


class Folding(NamedTuple):
    """One way to divide a layer's input; `low`, `high` fix the range of what is left, if given."""

    label: str
    factor: Tensor  # [D]
    shift: Tensor  # [D]
    low: Tensor | None = None
    high: Tensor | None = None


def none(width: int) -> Folding:
    return Folding("none", torch.ones(width), torch.zeros(width))


def smooth(act_reach: Tensor, weight_reach: Tensor, alpha: float) -> Folding:
    """SmoothQuant (arXiv 2211.10438, eq. 4): factor = max|X| ** alpha / max|W| ** (1 - alpha)."""
    factor = act_reach.clamp(min=1e-5) ** alpha / weight_reach.clamp(min=1e-5) ** (1 - alpha)
    return Folding(f"smooth-{alpha:g}", factor.clamp(min=1e-5), torch.zeros_like(factor))


def awq(mean_size: Tensor, rho: float) -> Folding:
    """AWQ (arXiv 2306.00978): factor = mean|X| ** rho, scaled so that its extremes multiply to 1.

    Channels with large inputs get larger weights, which rounding hurts less.
    """
    grown = mean_size.clamp(min=1e-4) ** rho
    return Folding(
        f"awq-{rho:g}", grown / (grown.max() * grown.min()).sqrt(), torch.zeros_like(grown)
    )


def repq(low: Tensor, high: Tensor, bits: int, label: str = "repq") -> Folding:
    """RepQ-ViT's scale reparameterisation (arXiv 2212.08254) from per-channel extremes [D].

    With the mean zero point rounded, the layer's one scale on x / factor + shift gives exactly the
    codes that one scale a channel gives on x.
    """
    reach = (high.clamp(min=0) - low.clamp(max=0)).clamp(min=TINY)
    scale = reach.clamp(min=LEAST_REACH * float(reach.mean())) / (2**bits - 1)
    zero = (-low.clamp(max=0) / scale).round()
    mean_scale, mean_zero = scale.mean(), zero.mean().round()
    first, last = code_limits(bits, False)
    return Folding(
        label,
        scale / mean_scale,
        mean_scale * (zero - mean_zero),
        (first - mean_zero) * mean_scale,
        (last - mean_zero) * mean_scale,
    )


def clip_extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """LRP-QViT's clipped channel-wise ranges, in our formulation: whiskers of all channels [D]."""
    bounds = []
    for ends in (low, high):
        q1, q3 = torch.quantile(ends, torch.tensor([0.25, 0.75]))
        bounds.append((q1 - WHISKERS * (q3 - q1), q3 + WHISKERS * (q3 - q1)))
    return low.clamp(min=bounds[0][0]), high.clamp(max=bounds[1][1])
