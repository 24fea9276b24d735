"""Between a model that rounds and its float counterparts."""

import copy
from dataclasses import replace

import torch
from torch import nn

from compress.clip import Clip, build
from compress.model import ClipModel
from compress.nn.fake import RoundedConv2d, RoundedEmbedding, RoundedLinear
from compress.scheme import Scheme, apply_

Rounded = RoundedLinear | RoundedConv2d | RoundedEmbedding


def with_scheme(model: ClipModel, scheme: Scheme) -> ClipModel:
    """A copy of a float model whose layers round as the scheme says, numbers not yet set."""
    assert model.config.scheme is None, "the model is quantized already"
    made = copy.deepcopy(model)
    made.config = model.config.model_copy(update={"scheme": scheme})
    apply_(made, scheme)
    return made


def rounded_layers(model: nn.Module) -> dict[str, Rounded]:
    """Every layer of a model that has a rounded weight or input, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Rounded)}


@torch.no_grad()
def float_twin(clip: Clip) -> Clip:
    """The same model in plain float layers: weights on their grid, activations not rounded.

    A model without a scheme is returned as it is.
    """
    model = clip.model
    if model.config.scheme is None:
        return clip
    config = model.config.model_copy(update={"scheme": None})
    with torch.device("meta"):
        names = ClipModel(config).state_dict().keys()
    state = {name: value for name, value in model.state_dict().items() if name in names}
    for name, layer in rounded_layers(model).items():
        state[f"{name}.weight"] = layer.rounded_weight().detach()
    return replace(clip, model=build(config, state, "float twin"))
