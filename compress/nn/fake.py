"""Layers that compute with rounded weights and inputs, in float; they train by straight-through.

The weight stays as it came: rounding happens in the forward pass, from scales kept beside it, so a
weight that lies on its grid is unchanged, and one in training moves between its codes. Scales are
kept as logarithms: they stay positive, and an optimiser's step on them is relative.

Shapes: O output channels, D input width, G groups of input columns, B batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.nn import power
from compress.nn.quant import (
    code_limits,
    dynamic_range,
    expand,
    fake_quantize,
    lsq_gradient,
    scale_and_zero,
)

# Tensors that a kind of rounding keeps beside scale and zero point.
NUM_EXTRA = {"twin": 2, "log2": 2, "log_sqrt2": 2, "adalog": 2}
RATES = {"log2": 1.0, "log_sqrt2": 0.5}


class WeightCodes(nn.Module):
    """Scales of a weight [O, ...] and its rounding; `log_scale` and `zero` are [O * G]."""

    soft: Tensor | None
    """Share of a step above the floor [O, D], while rounding is being learnt; else None."""

    def __init__(
        self, bits: int, symmetric: bool, out: int, groups: int, device: torch.device
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.out = bits, symmetric, out
        self.limits = code_limits(bits, symmetric)
        self.log_scale = nn.Parameter(torch.zeros(out * groups, device=device))
        self.register_buffer("zero", torch.zeros(out * groups, device=device))
        self.zero: Tensor
        self.soft = None

    @property
    def scale(self) -> Tensor:
        """Steps [O * G]."""
        return self.log_scale.exp()

    @torch.no_grad()
    def set_(self, scale: Tensor, zero: Tensor) -> None:
        """Take scale and zero point [O, G]."""
        self.log_scale.copy_(scale.flatten().log())
        self.zero.copy_(zero.flatten())

    def per_column(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each entry of weight [O, ...], as [O, D]."""
        width = weight[0].numel()
        scale = self.scale
        if torch.is_grad_enabled():
            scale = lsq_gradient(scale, weight.numel() // len(scale), self.limits[1])
        return expand(scale.view(self.out, -1), width), expand(self.zero.view(self.out, -1), width)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the codes stand for, same shape."""
        flat = weight.flatten(1)
        scale, zero = self.per_column(weight)
        if self.soft is not None:
            codes = ((flat / scale).floor() + self.soft + zero).clamp(*self.limits)
            return ((codes - zero) * scale).view_as(weight)
        return fake_quantize(flat, scale, zero, self.limits).view_as(weight)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """Whole numbers [O, D], as float."""
        scale, zero = self.per_column(weight)
        return ((weight.flatten(1) / scale).round() + zero).clamp(*self.limits)


class ActRounding(nn.Module):
    """Rounds activations; `kind` is `LayerScheme.act`, `width` D their channels (for ptf)."""

    def __init__(
        self, bits: int, kind: str, symmetric: bool, width: int, device: torch.device
    ) -> None:
        super().__init__()
        self.bits, self.kind, self.symmetric = bits, kind, symmetric
        self.limits = code_limits(bits, symmetric)
        self.drop = 0.0
        if kind == "dynamic":
            return
        self.log_scale = nn.Parameter(torch.zeros((), device=device))
        self.register_buffer("zero", torch.zeros((), device=device))
        self.zero: Tensor
        extra = width if kind == "ptf" else NUM_EXTRA.get(kind, 0)
        if extra:
            self.register_buffer("extra", torch.zeros(extra, device=device))
            self.extra: Tensor

    @property
    def scale(self) -> Tensor:
        """The step (the upper one of twin, the largest value of logarithms)."""
        return self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape; `drop` is QDrop's chance of an entry to stay as it is in training."""
        rounded = self._rounded(x.float()).to(x.dtype)
        if self.drop and torch.is_grad_enabled():
            return torch.where(torch.rand_like(x) < self.drop, x, rounded)
        return rounded

    def _rounded(self, x: Tensor) -> Tensor:
        if self.kind == "dynamic":
            low, high = dynamic_range(x.detach())
            return fake_quantize(x, *scale_and_zero(low, high, self.bits, False), (0, 255))
        if self.kind == "twin":
            low, split = self.extra[0], self.extra[1]
            return _passing(x, power.twin_quantize(x.detach(), self.scale, low, split, self.bits))
        if self.kind in ("log2", "log_sqrt2", "adalog"):
            rate, shift = self.extra[0], self.extra[1]
            powers = power.log_quantize(x.detach() + shift, self.scale, rate, self.bits)
            return _passing(x, powers - shift)
        if self.kind == "ptf":
            return fake_quantize(x, self.scale * self.extra.exp2(), self.zero, self.limits)
        if not torch.is_grad_enabled() and x.dtype == torch.float32:
            return torch.fake_quantize_per_tensor_affine(
                x, self.scale, self.zero.to(torch.int32), *self.limits
            )
        scale = lsq_gradient(self.scale, x.shape[-1], self.limits[1])
        return fake_quantize(x, scale, self.zero, self.limits)

    @torch.no_grad()
    def calibrate_(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Set the numbers from samples x [M, D] (or any shape) and the range that was chosen."""
        if self.kind == "dynamic":
            return
        if self.kind == "twin":
            step, small, split = power.fit_twin(x, self.bits)
            self.log_scale.fill_(step.log())
            self.extra.copy_(torch.stack([small, split]))
        elif self.kind in ("log2", "log_sqrt2", "adalog"):
            rates = [RATES[self.kind]] if self.kind in RATES else power.adalog_rates()
            shift = power.GELU_LOW + 1e-5 if float(x.min()) < 0 else 0.0
            scale, rate = power.fit_log(x, self.bits, rates, shift)
            self.log_scale.fill_(scale.log())
            self.extra.copy_(torch.tensor([rate, shift]))
        elif self.kind == "ptf":
            scale, zero, exponents = power.fit_power_of_two_factor(x, self.bits)
            self.log_scale.fill_(scale.log())
            self.zero.fill_(zero)
            self.extra.copy_(exponents)
        else:
            scale, zero = scale_and_zero(low, high, self.bits, self.symmetric)
            self.log_scale.fill_(scale.log())
            self.zero.fill_(zero)


def _passing(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x straight through it."""
    return rounded + (x - x.detach()) if torch.is_grad_enabled() else rounded


class RoundedLinear(nn.Linear):
    """A linear layer on rounded inputs with a rounded weight; `codes` None leaves the weight.

    `float_columns` (massive activations) are multiplied in float, and count as 0 for the rest.
    """

    codes: WeightCodes | None
    input: nn.Module
    float_columns: tuple[int, ...]

    @classmethod
    def around(
        cls,
        linear: nn.Linear,
        codes: WeightCodes | None,
        act: nn.Module,
        float_columns: tuple[int, ...] = (),
    ) -> "RoundedLinear":
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight, made.bias = linear.weight, linear.bias
        made.codes, made.input, made.float_columns = codes, act, float_columns
        return made

    def rounded_weight(self) -> Tensor:
        """What the layer multiplies with, float columns as they are."""
        rounded = self.weight if self.codes is None else self.codes(self.weight)
        if not self.float_columns:
            return rounded
        columns = self.beside()
        return rounded.index_copy(1, columns, self.weight[:, columns].to(rounded.dtype))

    def beside(self) -> Tensor:
        """The float columns as indices [K]."""
        return torch.tensor(self.float_columns, device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., D] -> [B, ..., O]."""
        weight = self.rounded_weight()
        if not self.float_columns:
            return F.linear(self.input(x), weight, self.bias)
        columns = self.beside()
        rounded = self.input(x.index_fill(-1, columns, 0))
        integers = F.linear(rounded, weight.index_fill(1, columns, 0), self.bias)
        return integers + F.linear(x[..., columns], weight[:, columns])


class RoundedConv2d(nn.Conv2d):
    """A convolution (the patch projection) on rounded pixels with a rounded weight."""

    codes: WeightCodes | None
    input: nn.Module

    @classmethod
    def around(cls, conv: nn.Conv2d, codes: WeightCodes | None, act: nn.Module) -> "RoundedConv2d":
        settings = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
        with torch.device("meta"):
            made = cls(*settings, bias=conv.bias is not None)  # type: ignore[arg-type]
        made.weight, made.bias = conv.weight, conv.bias
        made.codes, made.input = codes, act
        return made

    def rounded_weight(self) -> Tensor:
        return self.weight if self.codes is None else self.codes(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.input(x), self.rounded_weight(), self.bias, self.stride)


class RoundedEmbedding(nn.Embedding):
    """A table whose looked-up rows are rounded, one scale a row."""

    codes: WeightCodes | None

    @classmethod
    def around(cls, table: nn.Embedding, codes: WeightCodes | None) -> "RoundedEmbedding":
        with torch.device("meta"):
            made = cls(table.num_embeddings, table.embedding_dim)
        made.weight = table.weight
        made.codes = codes
        return made

    def rounded_weight(self) -> Tensor:
        return self.weight if self.codes is None else self.codes(self.weight)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        if self.codes is None:
            return rows
        scale = self.codes.log_scale[ids].exp().unsqueeze(-1)
        return fake_quantize(rows, scale, self.codes.zero[ids].unsqueeze(-1), self.codes.limits)
