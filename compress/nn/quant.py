"""Fake quantization: floats rounded to the values that integer codes stand for.

Shapes: O output channels, D input width, G groups of input columns, M samples. A range is
(low, high) with low <= 0 <= high, so that 0 has a code of its own.
"""

import torch
from torch import Tensor

# Shrunken ranges that a search tries, as fractions of the whole range.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4)
# RepQ-ViT's percentiles: [P] section 3 of arXiv 2212.08254.
PERCENTILES = (1.0, 0.99999, 0.9999, 0.999)
# Entries on which candidates are compared; extremes are always taken from all.
SAMPLES = 32_768
TINY = 1e-9


def code_limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code; symmetric ones leave out the lowest, so -w is as exact as w."""
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Step and zero point (a whole number, as float) of ranges of any shape."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    first, last = code_limits(bits, symmetric)
    if symmetric:
        scale = torch.maximum(-low, high) / last
        return torch.where(scale > TINY, scale, torch.ones_like(scale)), torch.zeros_like(scale)
    scale = (high - low) / (last - first)
    scale = torch.where(scale > TINY, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(first, last)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int]) -> Tensor:
    """scale * (clamp(round(x / scale) + zero) - zero), shapes broadcast.

    Rounding passes gradients straight through: x has gradient 1 inside the range and 0 outside, and
    scale has LSQ's gradient (arXiv 1902.08153, eq. 3) by the product rule.
    """
    steps = x / scale
    codes = (steps.round() - steps).detach() + steps + zero
    return (codes.clamp(*limits) - zero) * scale


def lsq_gradient(scale: Tensor, num: int, last: int) -> Tensor:
    """The same scale with its gradient divided by sqrt(num * last): LSQ's section 2.2."""
    factor = (num * last) ** -0.5
    return scale * factor + (scale - scale * factor).detach()


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each sample, 0 included: x [B, ...] -> [B, 1, ...] twice."""
    dims = tuple(range(1, x.ndim))
    return x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)


def sample(x: Tensor, num: int = SAMPLES) -> Tensor:
    """At most `num` entries of a tensor of any shape, [num], the same ones each time."""
    flat = x.flatten().float()
    if len(flat) <= num:
        return flat
    return flat[torch.randint(len(flat), (num,), generator=torch.Generator().manual_seed(0))]


def search_range(x: Tensor, bits: int, symmetric: bool, method: str) -> tuple[Tensor, Tensor]:
    """The (low, high) of a tensor by `minmax`, or the candidate of least squared error.

    `percentile` tries RepQ-ViT's quantiles; `mse` shrinks the high end, then the low one. Returns
    scalars.
    """
    x = x.flatten().float()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    if method == "minmax" or high == low:
        return low, high
    if method == "percentile":
        ordered = x.sort().values
        reach = [round((len(ordered) - 1) * p) for p in PERCENTILES]
        ends = [(ordered[-1 - i].clamp(max=0), ordered[i].clamp(min=0)) for i in reach]
        return _least_error(sample(x), ends, bits, symmetric)
    x = sample(x)
    if symmetric:
        return _least_error(x, [(low * a, high * a) for a in SHRINK], bits, symmetric)
    low, high = _least_error(x, [(low, high * a) for a in SHRINK], bits, symmetric)
    return _least_error(x, [(low * a, high) for a in SHRINK if low < 0 or a == 1], bits, symmetric)


def _least_error(
    x: Tensor, ends: list[tuple[Tensor, Tensor]], bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    errors = []
    for low, high in ends:
        scale, zero = scale_and_zero(low, high, bits, symmetric)
        error = fake_quantize(x, scale, zero, code_limits(bits, symmetric)) - x
        errors.append(error.square().mean())
    return ends[int(torch.stack(errors).argmin())]


def grouped(weight: Tensor, group: int) -> Tensor:
    """[O, D] -> [O, G, D / G]; group 0 is one group. D must be a multiple of `group`."""
    out, width = weight.shape
    assert not group or width % group == 0, (width, group)
    return weight.reshape(out, -1, group or width)


def expand(per_group: Tensor, width: int) -> Tensor:
    """One value a group [O, G] -> one a column [O, D]."""
    return per_group.repeat_interleave(width // per_group.shape[1], dim=1)


def weight_scales(
    weight: Tensor, bits: int, symmetric: bool, group: int, search: bool, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero [O, G] of a matrix [O, D], one pair per output channel and group.

    With `search` each is the shrunken range of least squared error, or of least squared error of
    the layer's output where `gram` [D, D] (X^T X of its inputs) is given (AWQ's clip search; terms
    between groups are left out).
    """
    parts = grouped(weight, group)  # [O, G, d]
    low, high = parts.amin(2), parts.amax(2)
    blocks = None
    if gram is not None:
        size = parts.shape[2]
        blocks = torch.stack(
            [gram[i : i + size, i : i + size] for i in range(0, len(gram), size)]
        )  # [G, d, d]
    best, found = None, None
    for ratio in SHRINK if search else SHRINK[:1]:
        scale, zero = scale_and_zero(low * ratio, high * ratio, bits, symmetric)
        limits = code_limits(bits, symmetric)
        delta = fake_quantize(parts, scale[..., None], zero[..., None], limits) - parts
        moved = delta if blocks is None else torch.einsum("ogd,gde->oge", delta, blocks)
        error = (moved * delta).sum(2)  # [O, G]
        if best is None or found is None:
            best, found = error, (scale, zero)
        else:
            better = error < best
            best = torch.where(better, error, best)
            found = (
                torch.where(better, scale, found[0]),
                torch.where(better, zero, found[1]),
            )
    assert found is not None
    return found
