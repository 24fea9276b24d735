"""How many bits each layer gets: what its rounding does times what it matters, under a budget.

Shapes: M rows, D input width, O outputs, B pairs.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from compress import calibrate, lrp, sensitivity
from compress.allocate import Bits, Item, allocate, random_harm
from compress.calibrate import Calibration
from compress.equalize import Method
from compress.losses import clip_info_nce
from compress.model import ClipModel
from compress.nn.fake import ActRounding, RoundedConv2d, RoundedLinear
from compress.ptq import quantize
from compress.scheme import LayerScheme

Provider = Literal["fisher", "kl", "lrp", "uniform", "random"]
ROWS = 512
TOKEN_TABLE = "text.token"


def choose(
    model: ClipModel,
    layers: Mapping[str, LayerScheme],
    calibration: Calibration,
    equalize: Method,
    provider: Provider,
    choices: Sequence[int],
    budget: tuple[float, float, float | None],
    seed: int,
) -> dict[str, LayerScheme]:
    """The plan with bits per layer: average weight bits, average input bits, share of BOPs."""
    fixed = {n: e for n, e in layers.items() if n == TOKEN_TABLE or n.endswith("patch")}
    run = calibrate.collect(model, list(layers), calibration, 1)
    free = {name: entry for name, entry in layers.items() if name not in fixed and name in run}
    items = harms(model, free, calibration, equalize, choices)
    if provider == "random":
        items = random_harm(items, choices, seed)
    else:
        weights = importance(model, free, calibration, provider, items, min(choices), equalize)
        items = {name: _times(item, weights[name]) for name, item in items.items()}
    chosen = allocate(items, *budget)
    return fixed | {name: _with(free[name], bits) for name, bits in chosen.items()}


def _times(item: Item, factor: float) -> Item:
    return Item(
        item.num_weights,
        item.num_macs,
        {bits: value * factor for bits, value in item.weight_harm.items()},
        {bits: value * factor for bits, value in item.act_harm.items()},
    )


def _with(entry: LayerScheme, bits: Bits) -> LayerScheme:
    act = None if entry.act_bits is None else bits[1]
    return entry.model_copy(update={"weight_bits": bits[0], "act_bits": act})


@torch.no_grad()
def harms(
    model: ClipModel,
    layers: Mapping[str, LayerScheme],
    calibration: Calibration,
    equalize: Method,
    choices: Sequence[int],
) -> dict[str, Item]:
    """Relative squared error of each layer's output when its weight or its input has so many bits.

    For attention's operands, of the operand.
    """
    weight: dict[str, dict[int, float]] = {name: {} for name in layers}
    act: dict[str, dict[int, float]] = {name: {} for name in layers}
    sizes: dict[str, tuple[int, float]] = {}
    for bits in choices:
        plan = {name: _with(entry, _same(entry, bits)) for name, entry in layers.items()}
        made = quantize(model, plan, calibration, equalize)
        rows = calibrate.collect(made.folded, list(plan), calibration, ROWS)
        for name in plan:
            module, x = made.model.get_submodule(name), rows[name]
            plain = made.folded.get_submodule(name)
            act[name][bits] = _act_harm(module, plain, x)
            if isinstance(plain, nn.Linear):
                weight[name][bits] = _weight_harm(module, plain, x)
            sizes[name] = _sizes(model, name, plain, x)
    return {name: Item(*sizes[name], weight[name], act[name]) for name in layers}


def _same(entry: LayerScheme, bits: int) -> Bits:
    return (None if entry.weight_bits is None else bits), bits


def _sizes(model: ClipModel, name: str, module: nn.Module, x: Tensor) -> tuple[int, float]:
    """Weights, and multiplications per token: attention's operands meet one of their kind each."""
    if isinstance(module, nn.Linear):
        return module.weight.numel(), float(module.weight.numel())
    tower = getattr(model, name.split(".")[0])
    tokens = getattr(tower.config, "num_tokens", None) or tower.config.context_length
    return 0, float(tokens * x.shape[-1]) / 2


def _act_harm(module: nn.Module, plain: nn.Module, x: Tensor) -> float:
    if isinstance(module, ActRounding):
        return _relative(module(x), x)
    assert isinstance(module, RoundedLinear | RoundedConv2d)
    assert isinstance(plain, nn.Linear)
    return _relative(module.input(x) @ plain.weight.T, x @ plain.weight.T)


def _weight_harm(module: nn.Module, plain: nn.Linear, x: Tensor) -> float:
    assert isinstance(module, RoundedLinear)
    return _relative(x @ module.rounded_weight().T, x @ plain.weight.T)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12))


def importance(
    model: ClipModel,
    layers: Mapping[str, LayerScheme],
    calibration: Calibration,
    provider: Provider,
    items: Mapping[str, Item],
    bits: int,
    equalize: Method,
) -> dict[str, float]:
    """What a relative error of 1 at each layer's output would cost, by the provider's measure.

    kl: the divergence with that layer alone at `bits`, over its error there (our formulation).
    """
    if provider == "fisher":
        return fisher(model, list(layers), calibration)
    if provider == "lrp":
        return lrp.scores(model, calibration)
    if provider == "uniform":
        return dict.fromkeys(layers, 1.0)
    plan = {name: _with(entry, _same(entry, bits)) for name, entry in layers.items()}
    made = quantize(model, plan, calibration, equalize)
    harm = sensitivity.kl(made, list(layers), calibration)
    return {
        name: harm[name] / max(sum(h[bits] for h in _parts(items[name])), 1e-12) for name in layers
    }


def _parts(item: Item) -> list[Mapping[int, float]]:
    return [harm for harm in (item.weight_harm, item.act_harm) if harm]


def fisher(model: ClipModel, names: list[str], calibration: Calibration) -> dict[str, float]:
    """Sum over a layer's outputs of E[gradient ** 2] * E[output ** 2]: the empirical Fisher
    information of the contrastive loss times the squared size of what is disturbed."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, out: Tensor) -> Tensor:
        out = out if out.requires_grad else out.clone().requires_grad_()
        out.retain_grad()
        outputs[name].append(out)
        return out

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: keep(name, out)
        )
        for name in names
    ]
    with torch.enable_grad():
        u, v = calibrate.embed(model, calibration)
        clip_info_nce(u, v, model.logit_scale.exp()).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return {name: _information(parts) for name, parts in outputs.items()}


def _information(parts: list[Tensor]) -> float:
    total = 0.0
    for out in parts:
        assert out.grad is not None
        slopes, values = (t.detach().reshape(-1, t.shape[-1]) for t in (out.grad, out))
        total += float((slopes.square().sum(0) * values.square().mean(0)).sum())
    return total
