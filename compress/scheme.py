"""What is quantized and how, as data in model.json: one entry per layer name.

A model with a scheme computes with rounded weights and activations, whoever runs it; exporters turn
the entries into what their runtime has, and say which they could not. The numbers (scales, zero
points) are tensors beside the weights. What no entry names stays float.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from compress.errors import PocketclipError
from compress.nn import fake

Activation = Literal["static", "dynamic", "twin", "log2", "log_sqrt2", "adalog", "ptf"]
# What integer kernels of today's runtimes compute.
EXECUTABLE_WEIGHTS = (4, 7, 8)
SITES = ("query", "key", "value", "probabilities")


class LayerScheme(BaseModel):
    """How one layer's weight and input are rounded."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of a weight; None leaves it float."""
    weight_symmetric: bool = True
    """Whether codes are signed around a zero point of 0."""
    group: int = Field(default=0, ge=0)
    """Input columns that share a scale within an output channel; 0: the whole channel."""
    act_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of the layer's input; None leaves it float."""
    act: Activation = "static"
    """static and dynamic: equal steps, from calibration or from each call's extremes. The rest are
    simulated only: twin (PTQ4ViT), log2 (FQ-ViT), log_sqrt2 (RepQ-ViT), adalog, ptf (FQ-ViT)."""
    act_symmetric: bool = False
    """Whether the input's zero point is 0, which TensorRT needs."""
    ranges: Literal["minmax", "percentile", "mse", "learnt"] = "minmax"
    """How the ranges were found."""
    rounding: Literal["nearest", "gptq", "ridge", "reconstructed", "learnt"] = "nearest"
    """How the codes were chosen."""
    float_columns: tuple[int, ...] = ()
    """Inputs of a linear layer that are multiplied in float beside the integers: the neurons that
    massive activations come from."""
    equalized: str = "none"
    """What was folded into the layer before it: none, smooth-ALPHA, awq-RHO, repq or clipped."""

    @property
    def executable(self) -> bool:
        """Whether some runtime's kernels compute this: 8-bit pairs, or weights alone."""
        if self.act_bits is None:
            return self.weight_bits in (None, *EXECUTABLE_WEIGHTS)
        eight = self.act_bits == 8 and self.act in ("static", "dynamic")
        return eight and self.weight_bits in EXECUTABLE_WEIGHTS

    @property
    def label(self) -> str:
        """w8a8, w4a16, float."""
        if self.weight_bits is None and self.act_bits is None:
            return "float"
        return f"w{self.weight_bits or 16}a{self.act_bits or 16}"


class Scheme(BaseModel):
    """Entries by the module name that `ClipModel` gives a layer, such as image.blocks.0.mlp.up."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    layers: dict[str, LayerScheme]
    """What is rounded; attention's query, key, value and probabilities may be named too."""
    rest: Literal["float32", "float16"] = "float32"
    """How exporters store a model of which nothing is rounded."""

    @model_validator(mode="after")
    def _half_stands_alone(self) -> "Scheme":
        if self.layers and self.rest == "float16":
            raise ValueError("rest: float16 is for models without rounded layers")
        return self

    @model_validator(mode="after")
    def _sites_have_no_weight(self) -> "Scheme":
        for name, layer in self.layers.items():
            if name.rsplit(".", 1)[-1] in SITES and layer.weight_bits is not None:
                raise ValueError(f"{name} has no weight, so it takes act_bits only")
        return self

    @property
    def executable(self) -> bool:
        """Whether a runtime computes all of it; otherwise its figures are simulated."""
        return all(layer.executable for layer in self.layers.values())

    @property
    def label(self) -> str:
        """The one precision of all matrices, or `mixed`; tables and sites don't count."""
        if not self.layers:
            return self.rest
        labels = {
            layer.label
            for name, layer in self.layers.items()
            if name.rsplit(".", 1)[-1] not in (*SITES, "token", "patch")
        }
        return labels.pop() if len(labels) == 1 else "mixed"


def apply_(model: nn.Module, scheme: Scheme) -> None:
    """Replace every layer that the scheme names by its rounded counterpart, weights kept.

    Raises PocketclipError for a name that is no layer of this model.
    """
    modules = dict(model.named_modules())
    for name, layer in scheme.layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | nn.Identity):
            raise PocketclipError(
                f"scheme.layers.{name}: the model has no such linear, convolution, table or "
                "attention site"
            )
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent).__setattr__(last, _rounded(module, layer))


def _rounded(module: nn.Module, layer: LayerScheme) -> nn.Module:
    act = _act(module, layer)
    if isinstance(module, nn.Identity):
        return act
    bits, symmetric = layer.weight_bits, layer.weight_symmetric
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    out = weight.shape[0]
    per_row = weight[0].numel() // (layer.group or weight[0].numel())
    codes = None if bits is None else fake.WeightCodes(bits, symmetric, out, per_row, weight.device)
    if isinstance(module, nn.Embedding):
        return fake.RoundedEmbedding.around(module, codes)
    if isinstance(module, nn.Conv2d):
        return fake.RoundedConv2d.around(module, codes, act)
    assert isinstance(module, nn.Linear)
    return fake.RoundedLinear.around(module, codes, act, layer.float_columns)


def _act(module: nn.Module, layer: LayerScheme) -> nn.Module:
    if layer.act_bits is None:
        return nn.Identity()
    width = module.in_features if isinstance(module, nn.Linear) else 1
    device = next((p.device for p in module.parameters()), torch.get_default_device())
    return fake.ActRounding(layer.act_bits, layer.act, layer.act_symmetric, width, device)
