"""Numbers as wide as a loss needs them: half precision becomes float32, float64 stays."""

import torch
import torch.nn.functional as F
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider. Any shape."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """x [..., E] at unit length along the last dimension, widened."""
    return F.normalize(widened(x), dim=-1)
