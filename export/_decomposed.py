"""A scheme as torch's own quantize and dequantize operators, which ExecuTorch and LiteRT lower.

Layers of 8-bit inputs become the pattern that PT2E leaves: quantize and dequantize an int8 input,
in a fixed range or in that of the call, dequantize an integer weight, a plain linear layer. Weights
have 8 bits and a scale a row; with ranges of the call also 4 bits and a scale a group. Everything
else computes in float on its rounded weight, and is named.

Shapes: B batch, D input width, O output width, G groups of input columns.
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
# The least step of a range that is found while running, as PT2E's operator wants it.
LEAST_STEP = 1e-9
# XNNPACK's 4-bit kernels read so many weights at a time.
BLOCK = 32


class IntegerLinear(nn.Module):
    """A linear layer between the operators that mark its input and weight as int8."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    columns: Tensor
    """[K, D], one 1 a row: the inputs that stay float."""
    columns_weight: Tensor
    """[O, K]."""
    rest: Tensor
    """[D], 0 at the columns."""

    def __init__(self, layer: RoundedLinear, folded: bool, dynamic: bool) -> None:
        super().__init__()
        self.folded, self.dynamic = folded, dynamic
        assert layer.codes is not None and isinstance(layer.input, ActRounding)
        if not dynamic:
            shift = 0 if layer.input.symmetric else SIGNED
            self.step, self.zero = float(layer.input.scale), int(layer.input.zero) - shift
        self.low = -127 if layer.input.symmetric and not dynamic else -128
        weight, floats = layer.weight.detach(), layer.rounded_weight().detach()
        self.chosen = len(layer.float_columns)
        if self.chosen:
            columns = layer.beside()
            one_hot = F.one_hot(columns, layer.in_features).float()
            self.register_buffer("columns", one_hot)
            self.register_buffer("columns_weight", floats[:, columns].clone())
            self.register_buffer("rest", 1 - one_hot.sum(0))
            weight, floats = (w.index_fill(1, columns, 0) for w in (weight, floats))
        codes = layer.codes.codes(weight).to(torch.int8)
        self.register_buffer("weight", codes if folded else floats)
        scale = layer.codes.scale.detach().clone()
        self.group = 0 if layer.codes.bits > 4 else layer.in_features * len(codes) // len(scale)
        scale = scale.view(len(codes), -1) if self.group else scale
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", torch.zeros(scale.shape, dtype=torch.int64))
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., D] -> [B, ..., O]."""
        matrix = self._matrix()
        if not self.chosen:
            return F.linear(self._rounded(x), matrix, self.bias)
        # Columns are picked by a product, as XNNPACK has no gather.
        beside = F.linear(F.linear(x, self.columns), self.columns_weight)
        return F.linear(self._rounded(x * self.rest), matrix, self.bias) + beside

    def _matrix(self) -> Tensor:
        """The weight [O, D] behind its operators."""
        ops = torch.ops.quantized_decomposed
        if self.group:
            limits = (-8, 7, torch.int8, self.group, torch.float32)
            numbers = (self.weight_scale, self.weight_zero)
            four: Tensor = ops.dequantize_per_channel_group(self.weight, *numbers, *limits)
            return four
        per_channel = (self.weight_scale, self.weight_zero, 0, -127, 127, torch.int8)
        integers = self.weight
        if not self.folded:
            integers = ops.quantize_per_channel(integers, *per_channel)
        eight: Tensor = ops.dequantize_per_channel(integers, *per_channel)
        return eight

    def _rounded(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        limits = (self.low, 127, torch.int8)
        if self.dynamic:
            found = ops.choose_qparams.tensor(x, self.low, 127, LEAST_STEP, torch.int8)
            codes = ops.quantize_per_tensor.tensor(x, *found, *limits)
            return ops.dequantize_per_tensor.tensor(codes, *found, *limits)
        codes = ops.quantize_per_tensor(x, self.step, self.zero, *limits)
        return ops.dequantize_per_tensor(codes, self.step, self.zero, *limits)


@torch.no_grad()
def realise(
    clip: Clip, tower: str, folded: bool = True, dynamic: bool = False
) -> tuple[nn.Module, dict[str, str]]:
    """One tower with integer layers, and what is computed otherwise than the scheme says.

    folded: weights stand as int8 behind their dequantize operator, as ExecuTorch takes them; else
    as floats in front of both operators, as LiteRT's converter does. dynamic: a runtime whose
    kernels find their inputs' ranges while running, whatever the scheme says.
    """
    # imported for its side effect: it defines quantized_decomposed
    import torch.ao.quantization.fx._decomposed  # noqa: F401

    scheme = clip.model.config.scheme
    assert scheme is not None
    module = copy.deepcopy(getattr(float_twin(clip).model, tower))
    notes = {tower: "asked float16, runs in float32"} if scheme.rest == "float16" else {}
    for name, entry in scheme.layers.items():
        if name.split(".")[0] != tower:
            continue
        inside = name.partition(".")[2]
        layer = clip.model.get_submodule(name)
        if isinstance(layer, RoundedLinear) and runs(entry, layer.in_features, dynamic):
            parent, _, last = inside.rpartition(".")
            made = IntegerLinear(layer, folded, dynamic)
            setattr(module.get_submodule(parent), last, made)
            if dynamic and entry.act == "static":
                notes[name] = f"asked {entry.label} static, runs {entry.label} dynamic"
        elif not isinstance(layer, RoundedEmbedding) or entry.act_bits is not None:
            kind = "its weight rounded" if isinstance(layer, RoundedLinear | RoundedConv2d) else ""
            notes[name] = f"asked {entry.label} {entry.act}, runs in float {kind}".strip()
    return module.eval(), notes


def runs(entry: LayerScheme, width: int, dynamic: bool = False) -> bool:
    """Whether the integer pattern computes this entry, by kernels with fixed or own ranges."""
    if entry.act_bits != 8 or not entry.weight_symmetric:
        return False
    if not dynamic:
        return entry.act == "static" and entry.weight_bits in (7, 8) and not entry.group
    if entry.weight_bits == 4:
        return entry.act == "dynamic" and (entry.group or width) % BLOCK == 0
    return entry.act in ("static", "dynamic") and entry.weight_bits in (7, 8) and not entry.group
