"""Settings of the quantization experiment."""

import copy
from typing import Any

import torch

from compress.layers import Block
from compress.model import ClipModel, plain_image_tower
from compress.nn.vectors import Kind

RUNTIMES = {
    "onnxruntime": {"precision": "int8"},
    "openvino": {"precision": "int8"},
    "executorch": {"precision": "int8"},
    "litert": {"precision": "int8"},
    "litert-static": {"precision": "int8-static"},
}
"""Settings of the exporter that a runtime's name begins with."""
# These realise 8-bit inputs only.
EIGHT_BITS = {
    "executorch": ("w8a8", "w4a8"),
    "litert": ("w8a8",),
    "litert-static": ("w8a8",),
}
# Kernels that find their ranges while running: files are not to agree with fixed ranges.
OWN_RANGES = ("executorch", "litert")
FIXED_PROMPTS = "w8a8"
PLAIN: dict[str, Any] = {
    "equalize": "none",
    "ranges": "minmax",
    "bias_correction": False,
    "float_neurons": 0,
}
W4 = {
    "act_bits": None,
    "weight_bits": 4,
    "group": 32,
    "weight_symmetric": False,
    "projection_bits": 8,
}
W8 = {"act_bits": None, "group": 32, "weight_symmetric": False, "rounding": "gptq"}
GPTQ: dict[str, Any] = {"equalize": "awq", "rounding": "gptq"}
EXECUTED: dict[str, dict[str, Any]] = {
    "w8a8": {},
    # What CPUs without VNNI need where two products are summed in 16 bits.
    "w7a8": {"weight_bits": 7},
    "w8a8 plain": dict(PLAIN),
    "w8a8 of 128": {"num_images": 128},
    "w8a8 rescued": {"rescue": 0.1},
    "w8a8 gptq": {"rounding": "gptq"},
    "w8a8 dynamic": {"act": "dynamic"},
    "w8 whole rows": {"act_bits": None},
    "w8": dict(W8),
    "w8 rescued": {**W8, "rescue": 0.1},
    "w8 in 16s": {**W8, "group": 16},
    "w8, texts in float": {**W8, "towers": ("image",)},
    "w4 rtn": {**W4, **PLAIN},
    "w4": {**W4, **GPTQ},
    "w4 reconstructed": {**W4, "equalize": "awq", "reconstruction": {"iterations": 300}},
    "w4a8": {"weight_bits": 4, "act": "dynamic", "group": 32, "rounding": "gptq"},
    "w4 in 64s rtn": {**W4, **PLAIN, "group": 64},
    "w4 in 64s": {**W4, **GPTQ, "group": 64},
}
# Extremes of the weights, to the nearest code: nothing is calibrated, so one seed is all there is.
UNCALIBRATED = ("w4 rtn", "w4 in 64s rtn")
# Ways to lose less, and what fewer samples cost: runtimes agree, one tells.
IN_ONE_RUNTIME = ("w8a8 of 128", "w8a8 rescued", "w8a8 gptq", "w4 reconstructed")
# Computes in float between 8-bit roundings, as the simulation does: one seed shows that they agree.
SHOWN_ONCE = ("litert-static",)


def runtimes(arm: str) -> list[str]:
    """Where an arm is executed."""
    if arm in IN_ONE_RUNTIME:
        return ["onnxruntime"]
    return [name for name in RUNTIMES if arm in EIGHT_BITS.get(name, EXECUTED)]


VECTORS: tuple[Kind, ...] = ("float32", "int8", "int4", "binary")
OUTLIERS = {"plain": dict(PLAIN), "cured": {}}

UNIFORM = {"attention": True, "equalize": "none", "ranges": "percentile"}
REPQ = {**UNIFORM, "family": "repq", "equalize": "repq"}
ADALOG = {**UNIFORM, "family": "adalog", "equalize": "repq", "ranges": "mse"}
RECONSTRUCTED = {**ADALOG, "reconstruction": {"iterations": 150, "batch_size": 16}}


def _bits(bits: int, settings: dict[str, Any]) -> dict[str, Any]:
    return {"weight_bits": bits, "act_bits": bits, **settings}


def _mixed(provider: str) -> dict[str, Any]:
    return {"weight_bits": 4, "act_bits": 4, **REPQ, "mixed": {"provider": provider}}


SIMULATED: dict[str, dict[str, Any]] = {
    "w6a6 uniform": _bits(6, UNIFORM),
    "w6a6 repq": _bits(6, REPQ),
    "w6a6 adalog": _bits(6, ADALOG),
    "w6a6 adalog ends of 8": _bits(6, {**ADALOG, "projection_bits": 8}),
    "w6a6 adalog erq": _bits(6, {**ADALOG, "rounding": "ridge"}),
    "w6a6 reconstructed": _bits(6, RECONSTRUCTED),
    "w4a4 uniform": _bits(4, UNIFORM),
    "w4a4 twin": _bits(4, {**UNIFORM, "family": "twin"}),
    "w4a4 ptf": _bits(4, {**UNIFORM, "family": "ptf"}),
    "w4a4 repq": _bits(4, REPQ),
    "mixed lrp": _mixed("lrp"),
    "mixed fisher": _mixed("fisher"),
    "mixed kl": _mixed("kl"),
    "mixed uniform": _mixed("uniform"),
    "mixed random": _mixed("random"),
    "w4a4 adalog": _bits(4, ADALOG),
    "w4a4 adalog erq": _bits(4, {**ADALOG, "rounding": "ridge"}),
    "w4a4 reconstructed": _bits(4, RECONSTRUCTED),
    "w3a3 uniform": _bits(3, UNIFORM),
    "w3a3 adalog": _bits(3, ADALOG),
    "w3a3 reconstructed": _bits(3, RECONSTRUCTED),
}


def with_outliers(model: ClipModel, reach: float = 60.0, every: int = 37) -> ClipModel:
    """The same function, with every so many channel of each norm `reach` times as large."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for block in made.modules():
            if not isinstance(block, Block):
                continue
            pairs = ((block.norm1, block.attention.qkv), (block.norm2, block.mlp.up))
            for norm, linear in pairs:
                norm.weight[::every] *= reach
                norm.bias[::every] *= reach
                linear.weight[:, ::every] /= reach
    return made


def with_massive_neurons(model: ClipModel, reach: float = 400.0) -> ClipModel:
    """A model with one neuron in each MLP that fires `reach` times as far, and is read as much
    less: what outlier tokens do to the range of an MLP's second matrix."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for block in made.modules():
            if isinstance(block, Block):
                block.mlp.up.weight[0] *= reach
                block.mlp.up.bias[0] *= reach
                block.mlp.down.weight[:, 0] /= reach
    return made


def with_outlier_token(model: ClipModel, reach: float = 400.0) -> ClipModel:
    """A model whose first patch becomes what a ViT's outlier tokens are: one neuron of each MLP
    fires for it alone, and makes its residual vector many times as long as any other's.

    Channel 0 marks the token from its position on; the neurons write into channel 1 and, once it
    is long, know the token by that.
    """
    made = copy.deepcopy(model)
    image = plain_image_tower(made, "an outlier token")
    with torch.no_grad():
        image.position[1 if image.config.class_token else 0, 0] += reach
        for block in image.blocks:
            assert isinstance(block, Block)
            up, down = block.mlp.up, block.mlp.down
            up.weight[0] = 0
            up.weight[0, :2] = reach / block.norm2.weight[:2]
            # One channel that holds all of a normalised vector is sqrt(D) there.
            up.bias[0] = -0.75 * reach * up.in_features**0.5
            down.weight[:, 0] = 0
            down.weight[1, 0] = 1
    return made


SPOILT = {
    "channels": with_outliers,
    "neurons": with_massive_neurons,
    "tokens": with_outlier_token,
}
# Every fourth picture of the held-out style is enough for a mean cosine.
OUTLIER_STRIDE = 4
