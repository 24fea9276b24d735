"""A scheme as torch's own quantize and dequantize operators, which ExecuTorch and LiteRT lower.

Static layers of 8 bits become the pattern that PT2E leaves: quantize and dequantize an int8 input,
dequantize an int8 weight, a plain linear layer. Everything else computes in float on its rounded
weight, and is named.

Shapes: B batch, D input width, O output width.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.clip import Clip
from compress.nn.fake import ActRounding, RoundedConv2d, RoundedEmbedding, RoundedLinear
from compress.scheme import LayerScheme
from compress.twin import float_twin

# XNNPACK and TFLite have signed inputs; the codes of an unsigned range move by this.
SIGNED = 128


class IntegerLinear(nn.Module):
    """A linear layer between the operators that mark its input and weight as int8."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None

    def __init__(self, layer: RoundedLinear, folded: bool) -> None:
        super().__init__()
        self.folded = folded
        assert layer.codes is not None and isinstance(layer.input, ActRounding)
        shift = 0 if layer.input.symmetric else SIGNED
        self.step, self.zero = float(layer.input.scale), int(layer.input.zero) - shift
        self.low = -127 if layer.input.symmetric else -128
        codes = layer.codes.codes(layer.weight).to(torch.int8)
        self.register_buffer("weight", codes if folded else layer.rounded_weight().detach())
        self.register_buffer("weight_scale", layer.codes.scale.detach().clone())
        zeros = torch.zeros(len(self.weight), dtype=torch.int64)
        self.register_buffer("weight_zero", zeros)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., D] -> [B, ..., O]."""
        ops = torch.ops.quantized_decomposed
        limits = (self.low, 127, torch.int8)
        codes = ops.quantize_per_tensor(x, self.step, self.zero, *limits)
        rounded = ops.dequantize_per_tensor(codes, self.step, self.zero, *limits)
        per_channel = (self.weight_scale, self.weight_zero, 0, -127, 127, torch.int8)
        integers = self.weight
        if not self.folded:
            integers = ops.quantize_per_channel(integers, *per_channel)
        matrix = ops.dequantize_per_channel(integers, *per_channel)
        return F.linear(rounded, matrix, self.bias)


@torch.no_grad()
def realise(clip: Clip, tower: str, folded: bool = True) -> tuple[nn.Module, dict[str, str]]:
    """One tower with integer layers, and what is computed otherwise than the scheme says.

    folded: weights stand as int8 behind their dequantize operator, as ExecuTorch takes them; else
    as floats in front of both operators, as LiteRT's converter does.
    """
    # imported for its side effect: it defines quantized_decomposed
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    scheme = clip.model.config.scheme
    assert scheme is not None
    module = copy.deepcopy(getattr(float_twin(clip).model, tower))
    notes = {}
    for name, entry in scheme.layers.items():
        if name.split(".")[0] != tower:
            continue
        inside = name.partition(".")[2]
        layer = clip.model.get_submodule(name)
        if isinstance(layer, RoundedLinear) and runs(entry):
            parent, _, last = inside.rpartition(".")
            setattr(module.get_submodule(parent), last, IntegerLinear(layer, folded))
        elif not isinstance(layer, RoundedEmbedding) or entry.act_bits is not None:
            kind = "its weight rounded" if isinstance(layer, RoundedLinear | RoundedConv2d) else ""
            notes[name] = f"asked {entry.label} {entry.act}, runs in float {kind}".strip()
    return module.eval(), notes


def runs(entry: LayerScheme) -> bool:
    """Whether the integer pattern computes this entry."""
    eight = entry.act_bits == 8 and entry.weight_bits in (7, 8) and entry.act == "static"
    return eight and entry.weight_symmetric and not entry.group
