"""Settings of the quantization experiment."""

import copy
from typing import Any

import torch

from compress.layers import Block
from compress.model import ClipModel
from compress.nn.vectors import Kind

RUNTIMES = {
    "onnxruntime": {"precision": "int8"},
    "openvino": {"precision": "int8"},
    "executorch": {"precision": "int8"},
    "litert": {"precision": "int8-static"},
}
# These realise 8-bit pairs only: what LiteRT computes has fixed ranges, ExecuTorch's XNNPACK finds
# its own while running.
EIGHT_BITS = {"executorch": ("w8a8",), "litert": ("w8a8",)}
# ... so its files are not to agree with the simulation of fixed ranges.
OWN_RANGES = ("executorch",)
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
GPTQ: dict[str, Any] = {"equalize": "awq", "rounding": "gptq"}
EXECUTED: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w8a8 plain": dict(PLAIN),
    "w8a8 dynamic": {"act": "dynamic"},
    "w8 whole rows": {"act_bits": None},
    "w8": {"act_bits": None, "group": 32, "weight_symmetric": False, "rounding": "gptq"},
    "w4 rtn": {**W4, **PLAIN},
    "w4": {**W4, **GPTQ},
    "w4 in 64s rtn": {**W4, **PLAIN, "group": 64},
    "w4 in 64s": {**W4, **GPTQ, "group": 64},
}


def runtimes(arm: str) -> list[str]:
    """Where an arm is executed."""
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
    "w6a6 adalog": _bits(6, ADALOG),
    "w4a4 uniform": _bits(4, UNIFORM),
    "w4a4 twin": _bits(4, {**UNIFORM, "family": "twin"}),
    "w4a4 ptf": _bits(4, {**UNIFORM, "family": "ptf"}),
    "w4a4 repq": _bits(4, REPQ),
    "mixed lrp": _mixed("lrp"),
    "mixed fisher": _mixed("fisher"),
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


def with_massive_neurons(model: ClipModel, reach: float = 60.0) -> ClipModel:
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


SPOILT = {"channels": with_outliers, "neurons": with_massive_neurons}
# Every fourth picture of the held-out style is enough for a mean cosine.
OUTLIER_STRIDE = 4
