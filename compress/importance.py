"""How much a model needs each of its heads and MLP channels, by four measures.

Every head and channel gets a gate, a factor of 1 on what it gives. Taylor (Molchanov et al. 2019):
the gradient of the loss by the gate. Activation: the size of what passes, times the weights that
read it. Module drop (MoPE-CLIP): the loss with the gate at 0. Progressive (after UPop's
description, our formulation): gradients added up while the least important fade and weights train.

Shapes: B batch, N tokens, H heads, K head width, M MLP channels, D width, E embedding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress import losses
from compress.layers import Block

Loss = Callable[[int], Tensor]
"""The loss of batch n, computed with the model as it stands."""


@dataclass(frozen=True)
class Place:
    """The heads or the channels of one block."""

    tower: str
    layer: int
    kind: str
    """heads or mlp."""


@dataclass
class Gates:
    """One factor per head or channel, for every block: place -> [H] or [M]."""

    values: dict[Place, Tensor]
    modules: dict[Place, nn.Linear] = field(repr=False)
    """The layer that reads what is gated."""


def gates_of(towers: dict[str, nn.ModuleList]) -> Gates:
    """All gates at 1; `towers` maps a tower's name to its blocks."""
    values: dict[Place, Tensor] = {}
    modules: dict[Place, nn.Linear] = {}
    for tower, blocks in towers.items():
        for layer, block in enumerate(blocks):
            assert isinstance(block, Block)
            heads, channels = Place(tower, layer, "heads"), Place(tower, layer, "mlp")
            values[heads] = torch.ones(block.attention.heads)
            values[channels] = torch.ones(block.mlp.down.in_features)
            modules |= {heads: block.attention.out, channels: block.mlp.down}
    return Gates(values, modules)


@contextmanager
def gated(gates: Gates) -> Iterator[None]:
    """The model with its gates as they are now, within the block."""

    def hook(place: Place) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        def multiply(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            gate = gates.values[place]
            return given[0] * gate.repeat_interleave(given[0].shape[-1] // len(gate))

        return multiply

    handles = [m.register_forward_pre_hook(hook(p)) for p, m in gates.modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def taylor(gates: Gates, loss: Loss, num_batches: int) -> dict[Place, Tensor]:
    """Mean over batches of |d loss / d gate|."""
    found = {place: torch.zeros_like(value) for place, value in gates.values.items()}
    for value in gates.values.values():
        value.requires_grad_()
    with gated(gates):
        for n in range(num_batches):
            for place, gradient in _gradients(gates, loss(n)).items():
                found[place] += gradient.abs() / num_batches
    return found


def activation(gates: Gates, loss: Loss, num_batches: int) -> dict[Place, Tensor]:
    """Mean |what passes|, times the norm of the weights that read it, summed within a head."""
    found = {place: torch.zeros_like(value) for place, value in gates.values.items()}

    def note(place: Place, module: nn.Linear, given: Tensor) -> None:
        size = given.abs().flatten(0, -2).mean(dim=0) * module.weight.norm(dim=0)
        found[place] += size.unflatten(0, (len(found[place]), -1)).sum(dim=1) / num_batches

    handles = [
        m.register_forward_pre_hook(lambda mod, given, place=p: note(place, mod, given[0]))
        for p, m in gates.modules.items()
    ]
    with torch.no_grad():
        for n in range(num_batches):
            loss(n)
    for handle in handles:
        handle.remove()
    return found


def module_drop(gates: Gates, loss: Loss, num_batches: int, chunks: int = 8) -> dict[Place, Tensor]:
    """How much the loss rises without a head, or without a chunk of the channels (equal parts)."""
    found = {place: torch.zeros_like(value) for place, value in gates.values.items()}
    with torch.no_grad(), gated(gates):
        for n in range(num_batches):
            whole = loss(n)
            for place, value in gates.values.items():
                parts = range(len(value)) if place.kind == "heads" else range(chunks)
                for units in torch.arange(len(value)).tensor_split(len(parts)):
                    value[units] = 0
                    found[place][units] += (loss(n) - whole) / num_batches / len(units)
                    value[units] = 1
    return found


def progressive(
    gates: Gates, loss: Loss, steps: int, share: float, optimizer: torch.optim.Optimizer
) -> dict[Place, Tensor]:
    """UPop: gradients add up over the steps while the lowest `share` of the units fades to 0.

    Heads and channels are compared after a z-score of each kind, over all layers and both towers.
    The model trains along. -> z-scores.
    """
    total = {place: torch.zeros_like(value) for place, value in gates.values.items()}
    scores = total
    with gated(gates):
        for step in range(steps):
            for gate in gates.values.values():
                gate.requires_grad_()
            value = loss(step)
            optimizer.zero_grad()
            for place, gradient in _gradients(gates, value, retain=True).items():
                total[place] += gradient.abs()
            value.backward()
            optimizer.step()
            scores = z_scores(total)
            done = (step + 1) / steps
            cut = torch.cat(list(scores.values())).quantile(share * done)
            for place, score in scores.items():
                gates.values[place] = torch.where(score <= cut, 1 - done, 1.0)
    return scores


def z_scores(scores: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """Scores less their mean over the standard deviation, for heads and for channels apart."""
    found = {}
    for kind in ("heads", "mlp"):
        own = {place: score for place, score in scores.items() if place.kind == kind}
        pooled = torch.cat(list(own.values()))
        for place, score in own.items():
            found[place] = (score - pooled.mean()) / pooled.std().clamp(min=1e-12)
    return found


def contrastive(u: Tensor, v: Tensor) -> Tensor:
    """The loss that importance is measured by: CLIP's, at its usual temperature. [B, E] each."""
    return losses.clip_info_nce(u, v, 50.0)


def _gradients(gates: Gates, value: Tensor, retain: bool = False) -> dict[Place, Tensor]:
    """d value / d gate for every gate; `value` was computed with these gates."""
    places = list(gates.values)
    found = torch.autograd.grad(value, [gates.values[p] for p in places], retain_graph=retain)
    return dict(zip(places, found, strict=True))
