"""Importance of heads and channels, against finite differences and loops."""

import pytest
import torch
from tiny import tiny_clip
from torch import Tensor

from compress import importance
from compress.clip import Clip
from compress.importance import Gates, Place

HEADS, CHANNELS = Place("image", 0, "heads"), Place("image", 1, "mlp")
PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def double() -> Clip:
    """In float64, where differences are exact enough."""
    clip = tiny_clip()
    clip.model.double()
    return clip


def gates(clip: Clip) -> Gates:
    found = importance.gates_of({"image": clip.model.image.blocks})
    found.values = {place: value.double() for place, value in found.values.items()}
    return found


def loss_of(clip: Clip) -> importance.Loss:
    return lambda n: clip.model.encode_image(PIXELS.double())[n].square().sum()


def test_taylor_is_the_gradient_by_finite_differences(double: Clip) -> None:
    loss, own = loss_of(double), gates(double)
    found = importance.taylor(own, loss, 1)
    for place, unit in ((HEADS, 2), (CHANNELS, 5)):
        values = []
        for step in (1e-4, -1e-4):
            moved = gates(double)
            moved.values[place][unit] += step
            with importance.gated(moved), torch.no_grad():
                values.append(float(loss(0)))
        slope = abs(values[0] - values[1]) / 2e-4
        assert float(found[place][unit]) == pytest.approx(slope, rel=1e-4)


def test_module_drop_is_the_loss_without_the_head(double: Clip) -> None:
    loss, own = loss_of(double), gates(double)
    found = importance.module_drop(own, loss, 2)
    rise = 0.0
    for n in range(2):
        out = double.model.image.blocks[0].attention.out.weight
        with torch.no_grad():
            whole, kept = float(loss(n)), out[:, 8:16].clone()
            out[:, 8:16] = 0
            rise += (float(loss(n)) - whole) / 2
            out[:, 8:16] = kept
    assert float(found[HEADS][1]) == pytest.approx(rise, rel=1e-6)
    assert all(torch.equal(v, torch.ones_like(v)) for v in own.values.values())


def test_activation_sees_a_dead_channel(double: Clip) -> None:
    block = double.model.image.blocks[1]
    with torch.no_grad():
        block.mlp.down.weight[:, 5] = 0
    found = importance.activation(gates(double), loss_of(double), 2)
    assert float(found[CHANNELS][5]) == 0 and float(found[CHANNELS].min()) == 0
    assert (found[HEADS] > 0).all()


def test_progressive_masks_fade_the_lowest_share() -> None:
    clip = tiny_clip()
    own = importance.gates_of({"image": clip.model.image.blocks})
    optimizer = torch.optim.SGD(clip.model.parameters(), lr=1e-4)

    def loss(n: int) -> Tensor:
        return clip.model.encode_image(PIXELS)[n % 4].square().sum()

    scores = importance.progressive(own, loss, 4, 0.4, optimizer)
    ends = torch.cat([value.detach() for value in own.values.values()])
    faded = float((ends == 0).float().mean())
    assert faded == pytest.approx(0.4, abs=0.03) and set(ends.tolist()) == {0.0, 1.0}
    lowest = min(own.values, key=lambda p: float(scores[p].min()))
    assert own.values[lowest][scores[lowest].argmin()] == 0


def test_z_scores_compare_heads_with_heads() -> None:
    scores = {HEADS: torch.tensor([100.0, 300.0]), CHANNELS: torch.tensor([1.0, 2.0, 3.0])}
    found = importance.z_scores(scores)
    assert float(found[HEADS].mean()) == pytest.approx(0) and float(found[CHANNELS][0]) == -1
