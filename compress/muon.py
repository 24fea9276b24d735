"""Muon, orthogonalised in the number format that the processor multiplies fast.

torch's own does it in bfloat16 on every device. A CPU without units for that computes it some forty
times slower than float32: longer than all else in a training step of a small tower.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress.precision import fastest


class Muon(torch.optim.Muon):
    """torch.optim.Muon with its update, state and settings; `match_rms_adamw` is the only scale of
    the learning rate (Liu et al., 2025: Muon is Scalable for LLM Training).
    """

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every matrix that has a gradient; what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"])
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"])
                rate = group["lr"] * 0.2 * math.sqrt(max(parameter.shape))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-rate)
        return loss


def orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, dtype: Any = None
) -> Tensor:
    """matrix [A, B] -> [A, B] with singular values near 1, by Newton-Schulz iterations (Jordan et
    al., 2024: Muon). dtype: what they are computed in; None: what its device is fastest at.
    """
    a, b, c = coefficients
    if dtype is None:
        narrow = fastest(matrix.device.type) == "bf16"
        dtype = torch.bfloat16 if narrow else torch.float32
    x = matrix.to(dtype)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
