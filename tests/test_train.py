"""The loop: exact resume, schedule, and what happens when a loss is not finite."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.errors import PocketclipError
from compress.train import CHECKPOINT, Training, fit, learning_rate, step_generator


class Stopped(Exception):
    """Stands for a kill between two steps."""


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def step_loss_of(net: nn.Module, stop_at: int | None = None):  # type: ignore[no-untyped-def]
    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise Stopped
        x = torch.randn(16, 4, generator=step_generator(0, step))
        return ((net(x) - x.sum(1, keepdim=True)) ** 2).mean(), {"twice": 2.0}

    return step_loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stop_at", [4, 7])
def test_resumed_weights_are_bit_identical(tmp_path: Path, stop_at: int, optimizer: str) -> None:
    settings = Training(steps=10, checkpoint_every=3, log_every=1, optimizer=optimizer)
    whole, broken = model(), model()
    fit(whole, step_loss_of(whole), settings, 0, tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(broken, step_loss_of(broken, stop_at), settings, 0, tmp_path / "broken")
    resumed = model()
    fit(resumed, step_loss_of(resumed), settings, 0, tmp_path / "broken")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    steps = [
        json.loads(x)["step"] for x in (tmp_path / "broken/log.jsonl").read_text().split("\n")[:-1]
    ]
    assert steps == list(range(10))


def test_a_loss_that_is_not_finite_names_step_and_remedy(tmp_path: Path) -> None:
    net = model()

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        loss, figures = step_loss_of(net)(step)
        return (loss * float("nan") if step == 5 else loss), figures

    with pytest.raises(PocketclipError, match=r"loss is nan at step 5.*lower lr"):
        fit(net, step_loss, Training(steps=9, checkpoint_every=2), 0, tmp_path)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 4


def test_fp16_skips_a_step_whose_gradients_overflow_and_resumes(tmp_path: Path) -> None:
    """The loss is finite, but 65,536 times it is not: the scale halves and the weights stay."""
    settings = Training(steps=6, checkpoint_every=3, precision="fp16", log_every=1, ema_decay=0)
    seen: list[Tensor] = []

    def overflowing(net: nn.Module, stop_at: int | None = None):  # type: ignore[no-untyped-def]
        usual = step_loss_of(net, stop_at)

        def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
            loss, figures = usual(step)
            seen.append(net[0].weight.detach().clone())  # type: ignore[index, operator]
            return (loss * 1e34 if step == 2 else loss), figures

        return step_loss

    whole, broken, resumed = model(), model(), model()
    fit(whole, overflowing(whole), settings, 0, tmp_path / "whole")
    assert torch.equal(seen[2], seen[3]), "the step that overflowed has moved the weights"
    assert not torch.equal(seen[1], seen[2]) and not torch.equal(seen[3], seen[4])
    with pytest.raises(Stopped):
        fit(broken, overflowing(broken, 4), settings, 0, tmp_path / "broken")
    saved = torch.load(tmp_path / "broken" / CHECKPOINT, weights_only=True)
    assert saved["step"] == 3 and saved["scaler"]["scale"] == 65536 / 2
    fit(resumed, overflowing(resumed), settings, 0, tmp_path / "broken")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    net = model()
    with pytest.raises(Stopped):
        fit(net, step_loss_of(net, 4), Training(steps=9, checkpoint_every=2), 0, tmp_path)
    with pytest.raises(PocketclipError, match="other settings"):
        fit(net, step_loss_of(net), Training(steps=8, checkpoint_every=2), 0, tmp_path)


def test_without_averaging_the_last_weights_are_returned(tmp_path: Path) -> None:
    last, averaged = model(), model()
    fit(last, step_loss_of(last), Training(steps=5, ema_decay=0), 0, tmp_path / "a")
    fit(averaged, step_loss_of(averaged), Training(steps=5, ema_decay=0.9), 0, tmp_path / "b")
    assert not torch.equal(last[0].weight, averaged[0].weight)  # type: ignore[index]


def test_averages_follow_fast_at_first(tmp_path: Path) -> None:
    """The decay is at most (1 + step) / (10 + step), so that the start is soon forgotten."""
    start, last, averaged = model(), model(), model()
    fit(last, step_loss_of(last), Training(steps=1, ema_decay=0), 0, tmp_path / "a")
    fit(averaged, step_loss_of(averaged), Training(steps=1, ema_decay=0.9), 0, tmp_path / "b")
    for name, value in averaged.state_dict().items():
        expected = 0.1 * start.state_dict()[name] + 0.9 * last.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)


def test_learning_rate_warms_up_and_falls_to_its_minimum() -> None:
    settings = Training(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
