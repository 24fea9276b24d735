"""Makes the inputs of linear layers easy to round, by equivalences folded into the layer before.

Each layer norm and the linear layer behind it, and each value projection and the output projection,
take the folding whose rounded output is nearest to the float one on calibration rows.

Shapes: O outputs, D channels, M rows, H heads, K head width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from compress.layers import Attention, Block
from compress.model import ClipModel
from compress.nn import smooth
from compress.nn.quant import (
    code_limits,
    dynamic_range,
    expand,
    fake_quantize,
    scale_and_zero,
    search_range,
    weight_scales,
)
from compress.nn.smooth import Folding
from compress.scheme import LayerScheme

Method = Literal["search", "smooth", "repq", "clipped", "awq", "none"]
# Rows on which candidates are compared.
ROWS = 512
Ranges = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def equalize_(
    model: ClipModel,
    layers: Mapping[str, LayerScheme],
    rows: Mapping[str, Tensor],
    method: Method,
) -> tuple[dict[str, str], Ranges]:
    """Fold in place -> what each layer took, and the input ranges that come with it.

    rows[name] [M, D] are the layer's float inputs; they are divided in place too.
    """
    taken: dict[str, str] = {}
    ranges: Ranges = {}
    if method == "none":
        return taken, ranges
    for name, linear, divide_ in _sites(model):
        if name not in layers or name not in rows:
            continue
        shifts = not name.endswith("attention.out")
        best = _best(linear.weight, rows[name], layers[name], method, shifts)
        _fold_(linear, best, divide_)
        rows[name].div_(best.factor).add_(best.shift)
        taken[name] = best.label
        if best.low is not None and best.high is not None:
            ranges[name] = (best.low, best.high)
    return taken, ranges


Site = tuple[str, nn.Linear, Callable[[Folding], None]]


def _sites(model: ClipModel) -> list[Site]:
    """Linear layers whose input can be divided in the layer before, and how.

    Where norms stand behind the residual sum, what they put out goes elsewhere too.
    """
    found: list[Site] = []
    for prefix, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        attention = block.attention
        found.append((f"{prefix}.attention.out", attention.out, partial(_divide_value_, attention)))
        if not block.post_norm:
            qkv, up = f"{prefix}.attention.qkv", f"{prefix}.mlp.up"
            found.append((qkv, attention.qkv, partial(_divide_norm_, block.norm1)))
            found.append((up, block.mlp.up, partial(_divide_norm_, block.norm2)))
    return found


def _best(
    weight: Tensor, rows: Tensor, layer: LayerScheme, method: Method, shifts: bool
) -> Folding:
    """The folding of least error on rows that it was not fitted to, fitted to all of them.

    Foldings that fill every channel's range clip more of what calibration did not see: judged on
    the rows they come from they always look best.
    """
    num = max(1, len(rows) // 4)
    tests, fits = rows[:num], rows[num:] if len(rows) > num else rows
    options = candidates(weight, fits, layer, method, shifts)
    stride = max(1, num // ROWS)
    errors = [output_error(weight, fits, tests[::stride], layer, option) for option in options]
    return candidates(weight, rows, layer, method, shifts)[int(torch.stack(errors).argmin())]


def candidates(
    weight: Tensor, rows: Tensor, layer: LayerScheme, method: Method, shifts: bool
) -> list[Folding]:
    """The foldings that a method tries; always at least one. `shifts`: a norm can add as well."""
    reach, size = rows.abs().amax(0), weight.abs().amax(0)
    plain = smooth.none(weight.shape[1])
    if layer.act_bits is None or method == "awq":
        return [plain, *(smooth.awq(rows.abs().mean(0), rho) for rho in smooth.RHOS)]
    smoothed = [smooth.smooth(reach, size, alpha) for alpha in smooth.ALPHAS]
    static = layer.act == "static" and not layer.act_symmetric and shifts
    if method == "smooth" or not static:
        return [plain, *smoothed] if method in ("smooth", "search") else [plain]
    low, high = rows.amin(0), rows.amax(0)
    repq = smooth.repq(low, high, layer.act_bits)
    clipped = smooth.repq(*smooth.clip_extremes(low, high), layer.act_bits, "clipped")
    if method == "repq":
        return [repq]
    return [repq, clipped] if method == "clipped" else [plain, *smoothed, repq, clipped]


def output_error(
    weight: Tensor, fits: Tensor, x: Tensor, layer: LayerScheme, folding: Folding
) -> Tensor:
    """Mean squared error of x W^T [M, O] when both are rounded after the folding; a scalar.

    fits [M', D]: where the input's range comes from.
    """
    moved, seen = (rows / folding.factor + folding.shift for rows in (x, fits))
    scaled = weight * folding.factor
    inputs = round_input(moved, seen, layer, folding)
    rounded = round_weight(scaled, layer)
    return (inputs @ rounded.T - folding.shift @ scaled.T - x @ weight.T).square().mean()


def round_input(x: Tensor, seen: Tensor, layer: LayerScheme, folding: Folding) -> Tensor:
    """x [M, D] as the layer's input would be rounded, by equal steps in the range of `seen`."""
    if layer.act_bits is None:
        return x
    if layer.act == "dynamic":
        low, high = (end[0] for end in dynamic_range(x.unsqueeze(0)))
    elif folding.low is not None and folding.high is not None:
        low, high = folding.low, folding.high
    else:
        low, high = search_range(seen, layer.act_bits, layer.act_symmetric, layer.ranges)
    scale, zero = scale_and_zero(low, high, layer.act_bits, layer.act_symmetric)
    return fake_quantize(x, scale, zero, code_limits(layer.act_bits, layer.act_symmetric))


def round_weight(weight: Tensor, layer: LayerScheme) -> Tensor:
    """weight [O, D] to its nearest codes."""
    bits, symmetric = layer.weight_bits, layer.weight_symmetric
    if bits is None:
        return weight
    scale, zero = weight_scales(weight, bits, symmetric, layer.group, search=False)
    width = weight.shape[1]
    limits = code_limits(bits, symmetric)
    return fake_quantize(weight, expand(scale, width), expand(zero, width), limits)


def _fold_(linear: nn.Linear, folding: Folding, divide_: Callable[[Folding], None]) -> None:
    """Divide what comes before; multiply the layer's columns, take the shift out of its bias."""
    divide_(folding)
    linear.weight.mul_(folding.factor)
    if folding.shift.any():
        assert linear.bias is not None
        linear.bias.sub_(linear.weight @ folding.shift)


def _divide_norm_(norm: nn.LayerNorm, folding: Folding) -> None:
    norm.weight.div_(folding.factor)
    norm.bias.div_(folding.factor).add_(folding.shift)


def _divide_value_(attention: Attention, folding: Folding) -> None:
    """Rows of softmax sum to 1, so dividing the values' rows and biases divides the mixture."""
    qkv = attention.qkv
    start = qkv.out_features * 2 // 3
    qkv.weight[start:].div_(folding.factor[:, None])
    qkv.bias[start:].div_(folding.factor)
