"""Which parameters decay, which Muon takes, and which keep a rate of their own."""

import pytest
import torch
from tiny import tiny_clip

from compress import parallel
from compress.optimizers import optimizers, set_lr
from compress.train import Training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(optimizer: str) -> None:
    model = tiny_clip().model
    cfg = Training(lr=0.5, weight_decay=0.1, optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers(model, cfg, []):
        each.step()
    for name, parameter in model.named_parameters():
        left = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * left, msg=name)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = tiny_clip().model
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = optimizers(model, Training(optimizer="muon"), [])
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken == {
        name for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2
    }
    assert not taken & rest and taken | rest == set(names.values())
    assert {"text.token.weight", "image.projection.weight", "logit_scale"} <= rest


def test_own_groups_keep_their_rate() -> None:
    model = tiny_clip().model
    own = {"params": [model.logit_scale], "lr": 0.7}
    found = optimizers(model, Training(lr=0.1), [own])
    set_lr(found, 0.01)
    rates = {
        id(p): group["lr"]
        for optimizer in found
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert rates.pop(id(model.logit_scale)) == 0.7 and set(rates.values()) == {0.01}


def test_clipping_scales_all_gradients_but_those_apart() -> None:
    model = torch.nn.ParameterList([torch.zeros(2), torch.zeros(1), torch.zeros(3)])
    for parameter, gradient in zip(model, ([3.0, 0.0], [4.0], [9.0, 9.0, 9.0]), strict=True):
        parameter.grad = torch.tensor(gradient)
    norm = parallel.clip_(model, 1.0, {id(model[2])})
    assert float(norm) == pytest.approx(5.0)
    found = [p.grad.tolist() for p in model if p.grad is not None]
    assert found[0] == pytest.approx([0.6, 0.0], abs=1e-5)
    assert found[1] == pytest.approx([0.8], abs=1e-5)
    assert found[2] == [9.0, 9.0, 9.0]
