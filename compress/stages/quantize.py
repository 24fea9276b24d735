"""Post-training quantization: decides what is rounded and how; exporters make it run.

The result is a model with a scheme (`compress/scheme.py`): its evaluation is the simulation, and
each exporter writes what its runtime computes of it. The default is W8A8, which runs anywhere:
foldings searched per layer, ranges by squared error, bias correction, a token table of 8 bits.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from compress import atomic, calibrate, mixed, ptq, reconstruct, sensitivity
from compress.clip import Clip
from compress.equalize import Method
from compress.errors import PocketclipError
from compress.fallback import Gates, descend
from compress.model import ClipModel
from compress.scheme import SITES, Activation, LayerScheme, Scheme
from compress.stages.exact import class_matrix
from compress.work import Work

VERSION = 4

Family = Literal["uniform", "repq", "twin", "ptf", "adalog"]
# What each family rounds differently from equal steps: site or layer -> kind.
FAMILIES: dict[str, dict[str, Activation]] = {
    "uniform": {},
    "repq": {"probabilities": "log_sqrt2"},
    "twin": {"probabilities": "twin", "mlp.down": "twin"},
    "ptf": {"probabilities": "log2", "attention.qkv": "ptf", "mlp.up": "ptf"},
    "adalog": {"probabilities": "adalog", "mlp.down": "adalog"},
}
PATCH_BITS = 8


class Mixed(BaseModel):
    """Bits per layer from an integer program, instead of the same for all."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight_bits: float = Field(default=4.0, ge=2, le=8)
    """Average bits of a weight, at most."""
    act_bits: float = Field(default=4.0, ge=2, le=8)
    """Average bits of an input, weighted by multiplications, at most."""
    bops: float | None = Field(default=None, gt=0)
    """Bound on bit operations, as a share of those of the two averages."""
    choices: tuple[int, ...] = (3, 4, 5, 6, 8)
    """Bits that a layer may get."""
    provider: mixed.Provider = "fisher"
    """What says how much a layer matters. fisher: gradients of the contrastive loss; kl: the
    similarities' divergence; lrp: relevance (patented: see `compress/nn/relevance.py`); uniform:
    all alike; random: a control."""


class Config(BaseModel):
    """Settings of the quantize stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight_bits: int = Field(default=8, ge=2, le=8)
    """Bits of the matrices' weights. 8 and 4 run (4 with act_bits null); 7 is 8 bits that cannot
    overflow on x86 without VNNI; the rest is simulated."""
    act_bits: int | None = Field(default=8, ge=2, le=8)
    """Bits of the matrices' inputs; null rounds weights alone. Runtimes run 8."""
    act: Literal["static", "dynamic"] = "static"
    """static: ranges from calibration. dynamic: from each call's extremes; with 4-bit weights in
    groups that is W4A8."""
    act_symmetric: bool = False
    """Zero points of 0 for inputs, which TensorRT needs."""
    weight_symmetric: bool = True
    """Zero points of 0 for weights; false suits 4 bits."""
    group: int = Field(default=0, ge=0)
    """Input columns that share a weight scale, such as 32, 64 or 128; 0: a whole output channel."""
    projection_bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of the last matrix of each tower and of its input; null: as the others."""
    table_bits: int | None = Field(default=8, ge=2, le=8)
    """Bits of the token table, one scale a row; null leaves it float."""
    family: Family = "uniform"
    """Which quantizers inputs get; all but uniform are simulated."""
    attention: bool = False
    """Whether the two products inside attention are rounded too (simulated)."""
    equalize: Method = "search"
    """Folding into the layer before: the best of SmoothQuant's alphas and RepQ's, or one kind."""
    ranges: Literal["minmax", "percentile", "mse"] = "mse"
    """How ranges are found."""
    rounding: Literal["nearest", "gptq", "ridge"] = "nearest"
    """How codes are chosen: to the nearest, GPTQ's error feedback, or ERQ's ridge correction."""
    reconstruction: reconstruct.Config | None = None
    """Learns the rounding of each block afterwards (BRECQ, QDrop)."""
    mixed: Mixed | None = None
    """Bits per layer; `weight_bits` and `act_bits` count for the patch projection alone then."""
    bias_correction: bool = True
    """Whether biases take over the mean error of each output."""
    float_neurons: int = Field(default=8, ge=0)
    """Most neurons of an MLP that are computed in float beside the integers, where they reach ten
    times as far as the median one: the massive activations of outlier tokens come from them."""
    rescue: float = Field(default=0.0, ge=0, le=0.1)
    """Share of layers that stay float: those whose rounding alone moves the similarities most."""
    fallback: Gates | None = None
    """Gates on executed files; where they fail, safer settings are tried, down to float."""
    towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    """What is rounded. `[image]` suits fixed prompts: the vectors of `data.classes`, computed once
    in float, go into every bundle."""
    num_images: int = Field(default=512, ge=1)
    """Training pairs for calibration. With a quarter of them int8 depends on which they are."""

    @model_validator(mode="after")
    def _dynamic_is_eight_bits(self) -> "Config":
        if self.act == "dynamic" and (self.act_bits != 8 or self.family != "uniform"):
            raise ValueError("act: dynamic needs act_bits 8 and family uniform")
        return self

    @model_validator(mode="after")
    def _mixed_rounds_inputs(self) -> "Config":
        if self.mixed is not None and self.act_bits is None:
            raise ValueError("mixed chooses bits of weights and inputs: set act_bits")
        return self


def needs_captions(cfg: Config) -> str | None:
    """Why pictures alone will not do, if they won't."""
    judged = "its fallback judges pictures by their captions: leave `fallback` out"
    return judged if cfg.fallback else None


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Quantize `work.clip`; writes quantize.json with what each layer got and lost, and with
    `fallback` also fallback.json with every step and its reason."""
    if work.clip.model.config.scheme is not None:
        raise PocketclipError("quantize: the model has a scheme already; start from a float one")
    step = {"step": "quantize", "settings": cfg.model_dump(mode="json"), "data": work.data.digest}
    if cfg.fallback is None:
        clip = work.clip.with_model(quantized(work, cfg, out), step)
        return replace(work, clip=with_classes(clip, work, cfg))

    def make(changes: dict[str, Any]) -> Clip:
        tried = Config.model_validate({**cfg.model_dump(), **changes, "fallback": None})
        return work.clip.with_model(quantized(work, tried, out), {**step, **changes})

    clip, steps = descend(work, make, cfg.fallback)
    atomic.write_json(out / "fallback.json", [asdict(judged) for judged in steps])
    return replace(work, clip=with_classes(clip, work, cfg))


def with_classes(clip: Clip, work: Work, cfg: Config) -> Clip:
    """The model with the class matrix of its text tower, where that tower stays float."""
    if cfg.towers != ("image",) or work.data.classes_file is None:
        return clip
    return replace(clip, classes=class_matrix(clip, work.data))


def quantized(work: Work, cfg: Config, out: Path) -> ClipModel:
    """The model with its scheme; the report goes to `out`."""
    model = work.clip.model
    calibration = calibrate.draw(work.clip, work.data, cfg.num_images, work.seed)
    layers = plan(model, cfg)
    if cfg.mixed is not None:
        layers = _mixed(model, layers, calibration, cfg, cfg.mixed, work.seed)
    settings = (cfg.equalize, cfg.bias_correction, cfg.float_neurons)
    made = ptq.quantize(model, layers, calibration, *settings)
    harm = sensitivity.kl(made, list(layers), calibration) if cfg.rescue else {}
    saved = rescued(harm, cfg.rescue)
    if saved:
        layers = {name: layer for name, layer in layers.items() if name not in saved}
        made = ptq.quantize(model, layers, calibration, *settings)
    if cfg.reconstruction is not None:
        reconstruct.reconstruct_(made, calibration, cfg.reconstruction, work.seed)
    scheme = made.model.config.scheme
    assert scheme is not None
    atomic.write_json(out / "quantize.json", report(scheme, made, calibration, harm, saved))
    return made.model


def _mixed(
    model: ClipModel,
    layers: dict[str, LayerScheme],
    calibration: calibrate.Calibration,
    cfg: Config,
    budget: Mixed,
    seed: int,
) -> dict[str, LayerScheme]:
    limits = (budget.weight_bits, budget.act_bits, budget.bops)
    return mixed.choose(
        model, layers, calibration, cfg.equalize, budget.provider, budget.choices, limits, seed
    )


def plan(model: ClipModel, cfg: Config) -> dict[str, LayerScheme]:
    """An entry for each layer of the chosen towers that can be rounded."""
    layers = {}
    for name, module in model.named_modules():
        if name.split(".")[0] not in cfg.towers:
            continue
        entry = _entry(name, module, cfg)
        if entry is not None:
            layers[name] = entry
    return layers


def _entry(name: str, module: nn.Module, cfg: Config) -> LayerScheme | None:
    if isinstance(module, nn.Embedding):
        if cfg.table_bits is None:
            return None
        return LayerScheme(weight_bits=cfg.table_bits, ranges=cfg.ranges)
    if isinstance(module, nn.Conv2d) and name == "image.patch":
        return _patch_entry(module, cfg)
    kind = _kind(name, cfg)
    if (
        type(module) is nn.Linear
    ):  # torch's attention reads its subclass's weight without calling it
        last = cfg.projection_bits if name.endswith(".projection") else None
        return LayerScheme(
            weight_bits=last or cfg.weight_bits,
            weight_symmetric=cfg.weight_symmetric,
            group=_group(module.in_features, cfg),
            act_bits=cfg.act_bits and (last or cfg.act_bits),
            act=kind,
            act_symmetric=cfg.act_symmetric and kind == "static",
            ranges=cfg.ranges,
            rounding=cfg.rounding,
        )
    if name.rsplit(".", 1)[-1] in SITES and cfg.attention and cfg.act_bits is not None:
        return LayerScheme(act_bits=cfg.act_bits, act=kind, ranges=cfg.ranges)
    return None


def _patch_entry(patch: nn.Conv2d, cfg: Config) -> LayerScheme:
    """Nearly eight bits whatever the rest gets; without rounded inputs as finely as the rest.

    Pixels of one sign under weights of one sign are the sums that overflow on CPUs without VNNI:
    with 8 bits they ruin every picture there, with 7 none can. Simulated bits run nowhere.
    """
    if cfg.act_bits is not None:
        runs = cfg.weight_bits >= 7 or cfg.act == "dynamic"
        bits = 7 if runs else PATCH_BITS
        return LayerScheme(weight_bits=bits, act_bits=PATCH_BITS, act=cfg.act, ranges=cfg.ranges)
    return LayerScheme(
        weight_bits=7 if cfg.weight_bits == 7 else PATCH_BITS,
        weight_symmetric=cfg.weight_symmetric,
        group=_group(patch.weight[0].numel(), cfg),
        ranges=cfg.ranges,
        rounding="gptq" if cfg.rounding == "gptq" else "nearest",
    )


def _group(width: int, cfg: Config) -> int:
    """Columns that share a scale; a width that groups don't divide is one group."""
    return cfg.group if cfg.group and width % cfg.group == 0 else 0


def _kind(name: str, cfg: Config) -> Activation:
    """What the family gives this layer; `act` where it says nothing."""
    kinds = FAMILIES[cfg.family]
    return next((kind for ending, kind in kinds.items() if name.endswith(ending)), cfg.act)


def rescued(harm: dict[str, float], share: float) -> list[str]:
    """The worst layers, at most `share` of all, none that does less harm than the average."""
    worst = sorted(harm, key=lambda name: -harm[name])[: int(len(harm) * share)]
    mean = sum(harm.values()) / max(len(harm), 1)
    return [name for name in worst if harm[name] > mean]


@torch.no_grad()
def report(
    scheme: Scheme,
    made: ptq.Quantized,
    calibration: calibrate.Calibration,
    harm: dict[str, float],
    saved: list[str],
) -> dict[str, object]:
    """What the stage decided, and how near the rounded model is on the calibration pairs."""
    wanted, found = (
        calibrate.embed(made.folded, calibration),
        calibrate.embed(made.model, calibration),
    )
    cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(wanted, found)]
    return {
        "executable": scheme.executable,
        "label": scheme.label,
        "num_pairs": len(calibration.pixels),
        "image_cosine": [float(cosines[0].mean()), float(cosines[0].min())],
        "text_cosine": [float(cosines[1].mean()), float(cosines[1].min())],
        "rescued": saved,
        "divergence": harm,
        "layers": {n: layer.model_dump(mode="json") for n, layer in scheme.layers.items()},
    }
