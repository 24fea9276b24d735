"""Post-training quantization: from a float model, a plan per layer and calibration pairs to a model
with a scheme.

Shapes: M rows, D input width, O outputs.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibrate import Calibration, collect
from compress.equalize import Method, equalize_
from compress.model import ClipModel
from compress.nn import rounding
from compress.nn.fake import ActRounding, RoundedConv2d, RoundedEmbedding, RoundedLinear
from compress.nn.quant import search_range, weight_scales
from compress.progress import tracked
from compress.scheme import LayerScheme, Scheme
from compress.twin import with_scheme

ROWS = 4096
# Layers whose input no layer before it can divide: an activation function lies between.
SPARED = "mlp.down"
# In the range of a neuron with ten times the median's reach the median one keeps 25 of 256 codes.
MASSIVE = 10.0


@dataclass(frozen=True)
class Quantized:
    """The result, and the float model of the same foldings that its layers are compared with."""

    model: ClipModel
    folded: ClipModel


@torch.no_grad()
def quantize(
    model: ClipModel,
    layers: Mapping[str, LayerScheme],
    calibration: Calibration,
    equalize: Method = "search",
    bias_correction: bool = True,
    float_neurons: int = 0,
) -> Quantized:
    """Fold, calibrate and round a copy of a float model; `layers` says what becomes of each.

    float_neurons: how many neurons of an MLP may stay float, those of massive activations.
    Layers that don't run as such stay float: a last block for one token computes with parts of its
    weights.
    """
    folded = copy.deepcopy(model)
    tables = {n for n, m in folded.named_modules() if isinstance(m, nn.Embedding)}
    rows = collect(folded, [name for name in layers if name not in tables], calibration, ROWS)
    taken, ranges = equalize_(folded, layers, rows, equalize)
    noted = {
        name: layer.model_copy(update={"equalized": taken.get(name, "none")})
        for name, layer in layers.items()
        if name in rows or name in tables
    }
    if float_neurons:
        noted |= {n: _spared(noted[n], rows[n], float_neurons) for n in rows if n.endswith(SPARED)}
    made = with_scheme(folded, Scheme(layers=noted))
    for name, layer in tracked(noted.items(), "rounding layers"):
        module = made.get_submodule(name)
        if isinstance(module, RoundedEmbedding):
            _round_table_(module, layer)
        elif isinstance(module, ActRounding):
            _calibrate_(module, layer, rows[name], None)
        else:
            assert isinstance(module, RoundedLinear | RoundedConv2d), type(module)
            _round_layer_(module, layer, rows[name], ranges.get(name), bias_correction)
    return Quantized(made.eval(), folded)


def _spared(layer: LayerScheme, x: Tensor, most: int) -> LayerScheme:
    """The entry with its massive inputs in float; x [M, D]."""
    if layer.act_bits is None or layer.act not in ("static", "dynamic"):
        return layer
    return layer.model_copy(update={"float_columns": massive(x, most)})


def massive(x: Tensor, most: int) -> tuple[int, ...]:
    """At most so many channels of x [M, D] whose reach is MASSIVE times that of the median one."""
    reach = x.abs().amax(0)
    found = (reach > MASSIVE * reach.median()).nonzero()[:, 0]
    largest = found[reach[found].argsort(descending=True)[:most]]
    return tuple(sorted(largest.tolist()))


def _round_layer_(
    module: RoundedLinear | RoundedConv2d,
    layer: LayerScheme,
    x: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    bias_correction: bool,
) -> None:
    """Set a layer's ranges and codes from its float inputs x [M, D]; float columns stay out."""
    if not layer.float_columns:
        _round_integers_(module, layer, x, bounds, bias_correction)
        return
    assert isinstance(module, RoundedLinear)
    columns = module.beside()
    floats = module.weight[:, columns]
    module.weight.index_fill_(1, columns, 0)
    _round_integers_(module, layer, x.index_fill(1, columns, 0), bounds, bias_correction)
    module.weight.index_copy_(1, columns, floats)


def _round_integers_(
    module: RoundedLinear | RoundedConv2d,
    layer: LayerScheme,
    x: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    bias_correction: bool,
) -> None:
    wanted = x @ module.weight.flatten(1).T  # [M, O]
    if isinstance(module.input, ActRounding):
        _calibrate_(module.input, layer, x, bounds)
    rounded = module.input(x)
    if layer.rounding == "ridge":
        change, offset = rounding.ridge(module.weight.flatten(1), x, rounded)
        module.weight.add_(change.view_as(module.weight))
        if module.bias is not None:
            module.bias.add_(offset)
            wanted = wanted - offset
    if layer.weight_bits is not None:
        _choose_codes_(module, layer, rounded)
    if bias_correction and module.bias is not None:
        found = rounded @ module.rounded_weight().flatten(1).T
        module.bias.add_((wanted - found).mean(0))


def _choose_codes_(
    module: RoundedLinear | RoundedConv2d, layer: LayerScheme, rounded: Tensor
) -> None:
    """Scales of a weight, and with `gptq` the weight's values on their grid."""
    codes, flat = module.codes, module.weight.flatten(1)
    assert codes is not None and layer.weight_bits is not None
    gram = rounded.T @ rounded / len(rounded)  # [D, D]
    scale, zero = weight_scales(
        flat,
        layer.weight_bits,
        layer.weight_symmetric,
        layer.group,
        layer.ranges != "minmax",
        gram,
    )
    codes.set_(scale, zero)
    if layer.rounding == "gptq":
        per_entry = codes.per_column(module.weight)
        module.weight.copy_(
            rounding.gptq(flat, *per_entry, codes.limits, gram).view_as(module.weight)
        )


def _round_table_(module: RoundedEmbedding, layer: LayerScheme) -> None:
    codes = module.codes
    if codes is None or layer.weight_bits is None:
        return
    search = layer.ranges != "minmax"
    scale, zero = weight_scales(
        module.weight, layer.weight_bits, layer.weight_symmetric, layer.group, search
    )
    codes.set_(scale, zero)


def _calibrate_(
    act: ActRounding, layer: LayerScheme, x: Tensor, bounds: tuple[Tensor, Tensor] | None
) -> None:
    if bounds is None:
        method = layer.ranges if act.kind == "static" else "minmax"
        bounds = search_range(x, act.bits, act.symmetric, method)
    act.calibrate_(x, *bounds)
