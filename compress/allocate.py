"""Mixed precision as an integer program: bits per layer of least harm under a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from compress.errors import PocketclipError


@dataclass(frozen=True)
class Item:
    """A layer that gets bits for its weight and for its input."""

    num_weights: int
    """Weights; 0 for an operand of attention."""
    num_macs: float
    """Multiplications per sample that take part."""
    weight_harm: Mapping[int, float]
    """What the weight costs at each number of bits; empty without a weight."""
    act_harm: Mapping[int, float]
    """What the input costs at each number of bits."""


Bits = tuple[int | None, int]
NO_WEIGHT: list[Any] = [None]


def allocate(
    items: Mapping[str, Item], weight_bits: float, act_bits: float, bops: float | None = None
) -> dict[str, Bits]:
    """(weight bits, input bits) of each item, of least summed harm.

    Weights have at most `weight_bits` on average, weighted by their number; inputs at most
    `act_bits`, weighted by multiplications; `bops` bounds the sum of macs * weight * input bits as
    a share of that of the two averages. Raises PocketclipError where nothing fits.
    """
    options: list[tuple[str, Bits]] = [
        (name, (w, a))
        for name, item in items.items()
        for w in [*item.weight_harm] or NO_WEIGHT
        for a in item.act_harm
    ]
    harm = [_harm(items[name], bits) for name, bits in options]
    weights = np.array([items[n].num_weights * (b[0] or 0) for n, b in options], float)
    acts = np.array([items[n].num_macs * b[1] for n, b in options], float)
    total_weights = sum(item.num_weights for item in items.values())
    total_macs = sum(item.num_macs for item in items.values())
    rows = [weights / max(total_weights, 1), acts / max(total_macs, 1)]
    limits = [weight_bits, act_bits]
    if bops is not None:
        both = np.array([items[n].num_macs * (b[0] or 0) * b[1] for n, b in options], float)
        rows.append(both / max(total_macs, 1))
        limits.append(bops * weight_bits * act_bits)
    once = np.array([[float(n == name) for n, _ in options] for name in items])
    found = milp(
        np.array(harm) / (max(harm) or 1.0),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.array(rows), -np.inf, np.array(limits) + 1e-9),
            LinearConstraint(once, 1, 1),
        ],
    )
    if found.x is None:
        raise PocketclipError(
            f"mixed: no choice of bits fits {weight_bits:g} for weights and {act_bits:g} for "
            "inputs; raise the averages or offer fewer bits"
        )
    return {name: bits for (name, bits), taken in zip(options, found.x) if taken > 0.5}


def _harm(item: Item, bits: Bits) -> float:
    return (item.weight_harm[bits[0]] if bits[0] is not None else 0.0) + item.act_harm[bits[1]]


def average(items: Mapping[str, Item], chosen: Mapping[str, Bits]) -> tuple[float, float]:
    """Mean weight bits and mean input bits of a choice, weighted as the budgets are."""
    weights = sum(items[n].num_weights * (w or 0) for n, (w, _) in chosen.items())
    acts = sum(items[n].num_macs * a for n, (_, a) in chosen.items())
    num_weights = sum(item.num_weights for item in items.values())
    return weights / num_weights, acts / sum(item.num_macs for item in items.values())


def random_harm(items: Mapping[str, Item], choices: Sequence[int], seed: int) -> dict[str, Item]:
    """The same layers with harms that say nothing about them: the control of an allocation."""
    random = np.random.default_rng(seed)
    made = {}
    for name, item in items.items():
        sizes = random.lognormal(sigma=2.0, size=2)
        weight = {b: float(sizes[0] * 4.0**-b) for b in choices} if item.weight_harm else {}
        act = {b: float(sizes[1] * 4.0**-b) for b in choices}
        made[name] = Item(item.num_weights, item.num_macs, weight, act)
    return made
