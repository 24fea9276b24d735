"""Research quantizers for what equal steps serve badly: softmax, GELU, channels of unequal reach.

Simulated only: no mainstream runtime has these kernels. Written from the papers' formulas.
Shapes: x of any shape unless stated; D channels.
"""

import torch
from torch import Tensor

from compress.nn.quant import (
    PERCENTILES,
    SHRINK,
    code_limits,
    fake_quantize,
    sample,
    scale_and_zero,
)

# AdaLog's table has 37 entries an octave, so its bases are 2 ** (q / 37).
ADALOG_PARTS = 37
# GELU's and QuickGELU's smallest values are -0.16997 and -0.1636.
GELU_LOW = 0.16997
PTF_EXPONENTS = 4
CHANNEL_ITEMS = 4096


def log_quantize(x: Tensor, scale: Tensor, rate: Tensor | float, bits: int) -> Tensor:
    """scale * 2 ** (-rate * code), code = round(-log2(x / scale) / rate); beyond the last code 0.

    rate 1 is FQ-ViT's log2, 1/2 RepQ-ViT's log of base sqrt 2, q / 37 AdaLog (arXiv 2407.12951).
    Values <= 0 become 0.
    """
    codes = (-(x / scale).clamp(min=1e-30).log2() / rate).round()
    kept = (codes < 2**bits) & (x > 0)
    return torch.where(kept, scale * torch.exp2(-rate * codes.clamp(min=0)), torch.zeros_like(x))


def fit_log(x: Tensor, bits: int, rates: list[float], shift: float) -> tuple[Tensor, float]:
    """(scale, rate) of least squared error over RepQ-ViT's percentiles and the given rates."""
    positive = (sample(x) + shift).clamp(min=0)
    ordered = positive.sort().values
    best: tuple[float, Tensor, float] | None = None
    for percentile in PERCENTILES:
        scale = ordered[round((len(ordered) - 1) * percentile)].clamp(min=1e-6)
        for rate in rates:
            error = (log_quantize(positive, scale, rate, bits) - positive).square().mean().item()
            if best is None or error < best[0]:
                best = (error, scale, rate)
    assert best is not None
    return best[1], best[2]


def adalog_rates() -> list[float]:
    """AdaLog's bases, every third."""
    return [q / ADALOG_PARTS for q in range(4, 2 * ADALOG_PARTS, 3)]


def twin_quantize(x: Tensor, high: Tensor, low: Tensor, split: Tensor, bits: int) -> Tensor:
    """Twin-uniform (PTQ4ViT, arXiv 2111.12293): step `low` below `split`, step `high` above it.

    Each side has half of the codes; below, they are signed, so that GELU's negative side fits.
    """
    half = 2 ** (bits - 1)
    small = (x / low).round().clamp(-half, half - 1) * low
    large = (x / high).round().clamp(0, half - 1) * high
    return torch.where(x < split, small, large)


def fit_twin(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(high step, low step, split) of least squared error.

    For values >= 0 (softmax) the split is searched in 2**0 .. 2**-19 and the high step is 1 over
    its codes; otherwise (GELU) the split is 0, the low step fixed and the high step searched.
    """
    x = sample(x)
    half = 2 ** (bits - 1)
    tensor = lambda value: torch.tensor(float(value))  # noqa: E731
    if x.min() >= 0:
        options = [
            (tensor(1 / (half - 1)), tensor(2.0**-n / (half - 1)), tensor(2.0**-n))
            for n in range(20)
        ]
    else:
        reach = x.max().clamp(min=1e-6) / (half - 1)
        low = tensor(max(GELU_LOW, float(-x.min())) / half)
        options = [(reach * ratio, low, tensor(0)) for ratio in SHRINK]
    errors = torch.stack([(twin_quantize(x, *o, bits) - x).square().mean() for o in options])
    return options[int(errors.argmin())]


def fit_power_of_two_factor(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """FQ-ViT's PTF (arXiv 2111.13824): x [M, D] -> (scale [], zero [], exponents [D]).

    One layer scale s, and 2 ** a steps of it per channel, a in 0..3 of least squared error.
    """
    rows = x.reshape(-1, x.shape[-1]).float()[:CHANNEL_ITEMS]
    widest, zero = scale_and_zero(rows.min(), rows.max(), bits, False)
    scale = widest / 2 ** (PTF_EXPONENTS - 1)
    errors = []
    for exponent in range(PTF_EXPONENTS):
        step = scale * 2**exponent
        rounded = fake_quantize(rows, step, zero, code_limits(bits, False))
        errors.append((rounded - rows).square().mean(0))
    return scale, zero, torch.stack(errors).argmin(0).float()
