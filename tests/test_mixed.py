"""Relevance is conserved, the integer program keeps its budget, and sensitivities rank layers."""

import copy
import itertools

import pytest
import torch
from tiny import tiny_clip, tiny_data

from compress import calibrate, lrp, mixed
from compress.allocate import Item, allocate, average, random_harm
from compress.errors import PocketclipError
from compress.nn import relevance
from compress.stages import quantize


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Calibration:
    return calibrate.draw(tiny_clip(), tiny_data(tmp_path_factory.mktemp("data")), 8, 0)


def randoms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_each_rule_conserves_relevance() -> None:
    x, weight, r = randoms(5, 7), randoms(4, 7, seed=1), randoms(5, 4, seed=2)
    assert float(relevance.linear(x, weight, r).sum()) == pytest.approx(float(r.sum()))
    a, b, r = randoms(2, 3, 4), randoms(2, 4, 6, seed=1), randoms(2, 3, 6, seed=2)
    parts = relevance.product(a, b, r)
    assert float(parts[0].sum()) == pytest.approx(float(r.sum()) / 2)
    assert float(parts[0].sum() + parts[1].sum()) == pytest.approx(float(r.sum()))
    x, y, r = randoms(3, 8), randoms(3, 8, seed=1), randoms(3, 8, seed=2)
    assert float(sum(relevance.add(x, y, r)).sum()) == pytest.approx(float(r.sum()))


def test_linear_rule_equals_a_slow_loop() -> None:
    x, weight, r = randoms(3), randoms(2, 3, seed=1), randoms(2, seed=2)
    found = relevance.linear(x, weight, r)
    for j in range(3):
        wanted = 0.0
        for i in range(2):
            positive = [max(float(x[k] * weight[i, k]), 0.0) for k in range(3)]
            wanted += positive[j] / sum(positive) * float(r[i])
        assert float(found[j]) == pytest.approx(wanted)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_relevance_is_conserved_through_a_tower(
    tower: str, calibration: calibrate.Calibration
) -> None:
    """From the last block's output to the first block's input, on what the blocks really see."""
    module = copy.deepcopy(getattr(tiny_clip().model, tower)).double()
    inputs = calibration.pixels.double() if tower == "image" else calibration.tokens
    seen: list[torch.Tensor] = []
    for block in module.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    module(inputs)
    entered = list(seen)
    relevance = seed = randoms(*entered[0].shape, seed=3).abs()
    mask = None if tower == "image" else module.mask[: seed.shape[1], : seed.shape[1]]
    with torch.no_grad():
        for block, x in reversed(list(zip(module.blocks, entered, strict=True))):
            relevance, found = lrp.block_relevance(block, x, mask, relevance)
            assert len(found) == 8 and min(found.values()) > 0
    assert float(relevance.sum()) == pytest.approx(float(seed.sum()), rel=0.01)


def test_every_layer_gets_its_share(calibration: calibrate.Calibration) -> None:
    model = tiny_clip().model
    layers = quantize.plan(model, quantize.Config(attention=True))
    shares = lrp.scores(model, calibration)
    assert set(layers) - {"image.patch", "text.token"} <= set(shares)
    up = [shares[f"image.blocks.{i}.mlp.up"] for i in range(2)]
    assert sum(up) == pytest.approx(1.0)


def items(num: int = 5) -> dict[str, Item]:
    random = torch.Generator().manual_seed(0)
    made = {}
    for i in range(num):
        size, macs, first, second = (torch.rand(4, generator=random) + 0.1).tolist()
        harm = [{b: v * 4.0**-b for b in (3, 4, 6)} for v in (first, second)]
        made[str(i)] = Item(round(1000 * size), macs, harm[0], harm[1])
    return made


def test_the_program_meets_its_budget_and_is_the_best() -> None:
    given = items(3)
    chosen = allocate(given, 4.3, 4.1)
    weight, act = average(given, chosen)
    assert weight <= 4.3 + 1e-6 and act <= 4.1 + 1e-6

    def harm(bits: dict[str, tuple[int | None, int]]) -> float:
        return sum(
            given[n].weight_harm[w or 0] + given[n].act_harm[a] for n, (w, a) in bits.items()
        )

    pairs = list(itertools.product((3, 4, 6), repeat=2))
    every = (dict(zip(given, bits)) for bits in itertools.product(pairs, repeat=3))
    fitting = [
        harm(bits)
        for bits in every
        if average(given, bits)[0] <= 4.3 and average(given, bits)[1] <= 4.1
    ]
    assert harm(chosen) == pytest.approx(min(fitting))


def test_bit_operations_bound_the_product() -> None:
    given = items()
    free, bound = allocate(given, 5.0, 5.0), allocate(given, 5.0, 5.0, bops=0.6)

    def bops(chosen: dict[str, tuple[int | None, int]]) -> float:
        total = sum(i.num_macs for i in given.values())
        return sum(given[n].num_macs * (w or 0) * a for n, (w, a) in chosen.items()) / total

    assert bops(bound) <= 0.6 * 25 + 1e-6 < bops(free)


def test_a_random_allocation_meets_the_same_budget() -> None:
    given = items()
    for seed in range(3):
        chosen = allocate(random_harm(given, (3, 4, 6), seed), 4.0, 4.0)
        weight, act = average(given, chosen)
        assert weight <= 4.0 + 1e-6 and act <= 4.0 + 1e-6


def test_a_budget_below_all_choices_is_refused() -> None:
    with pytest.raises(PocketclipError, match="no choice of bits fits 2"):
        allocate(items(), 2.0, 4.0)


@pytest.mark.parametrize("provider", ["fisher", "kl", "lrp", "uniform"])
def test_mixed_plans_keep_their_averages(
    provider: mixed.Provider, calibration: calibrate.Calibration
) -> None:
    model = tiny_clip().model
    layers = quantize.plan(model, quantize.Config(weight_bits=4, act_bits=4, attention=True))
    budget = (4.0, 4.0, None)
    made = mixed.choose(model, layers, calibration, "none", provider, (3, 4, 6), budget, 0)
    assert set(made) == set(layers) and made["text.token"] == layers["text.token"]
    matrices = {n: e for n, e in made.items() if n not in ("text.token", "image.patch")}
    sizes = {
        n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    spent = sum(sizes[n] * (e.weight_bits or 0) for n, e in matrices.items() if n in sizes)
    assert spent <= 4.0 * sum(sizes.values()) + 1e-6
    if provider != "uniform":
        assert len({(e.weight_bits, e.act_bits) for e in matrices.values()}) > 1


def test_fisher_is_the_gradient_times_the_size(calibration: calibrate.Calibration) -> None:
    """Doubling what a layer puts out, and halving what follows, changes nothing that matters."""
    model = copy.deepcopy(tiny_clip().model)
    names = ["image.blocks.1.attention.qkv", "image.projection"]
    before = mixed.fisher(model, names, calibration)
    with torch.no_grad():
        model.image.projection.weight.mul_(2.0)  # embeddings are made unit afterwards
    after = mixed.fisher(model, names, calibration)
    for name in names:
        assert after[name] == pytest.approx(before[name], rel=1e-3)
