"""Hard-concrete masks: gates between 0 and 1 that can be exactly 0 and still have a gradient.

From "Learning sparse neural networks through L0 regularization" (Louizos et al., 2018), with the
constants of TinyCLIP. Shapes: M entries of a mask.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOW, HIGH, TEMPERATURE, MARGIN = -0.1, 1.1, 2 / 3, 1e-6
LIMIT = math.log(100)
"""log_alpha is kept within +-LIMIT, so that no gate is lost for ever."""
SHARPNESS = 0.8


def sample(log_alpha: Tensor) -> Tensor:
    """A draw of the gates, from torch's global generator. [M] -> [M] in 0-1."""
    uniform = torch.rand(log_alpha.shape).to(log_alpha.device) * (1 - 2 * MARGIN) + MARGIN
    noise = uniform.log() - (1 - uniform).log()
    soft = torch.sigmoid((noise + log_alpha) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a gate is not 0. [M] -> [M]."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def decide(log_alpha: Tensor, at_least: int = 1, multiple_of: int = 1) -> Tensor:
    """The gates without chance: as many are closed as are expected to be, the rest stay soft.

    The number of open gates is the sum of their probabilities, rounded to `multiple_of` and never
    below `at_least`. [M] -> [M], with exact zeros.
    """
    soft = torch.sigmoid(log_alpha / TEMPERATURE * SHARPNESS)
    expected = float(open_probability(log_alpha).sum())
    num_open = max(1, round(expected / multiple_of)) * multiple_of
    num_open = min(len(soft), max(at_least, num_open))
    kept = soft.argsort(descending=True, stable=True)[:num_open]
    return soft * F.one_hot(kept, len(soft)).sum(dim=0)


def masked_layer_norm(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the open channels of `gates * x`, zero elsewhere. x [..., D], gates [D]."""
    is_open = (gates > 0).to(x.dtype)
    num_open = is_open.sum()
    x = x * gates
    mean = x.sum(dim=-1, keepdim=True) / num_open
    centred = (x - mean) * is_open
    variance = centred.square().sum(dim=-1, keepdim=True) / num_open
    return (centred * (variance + eps).rsqrt() * weight + bias) * is_open
