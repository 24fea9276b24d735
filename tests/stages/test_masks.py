"""Automatic inheritance: masked and pruned models agree, budgets are met, training resumes."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress.checkpoint import State
from compress.errors import PocketclipError
from compress.masks import Inherit, Masks, attach_, plain_configs, prunable_size, pruned
from compress.model import ClipModel
from compress.nn import hard_concrete
from compress.optimizers import optimizers
from compress.stages import distill
from compress.structure import ClipConfig
from compress.train import Training
from compress.work import Work

SHORT = {"batch_size": 8, "warmup_steps": 2, "lr": 3e-3, "precision": "fp32", "log_every": 1}
HALF = Inherit(keep=0.5, prune_step=4, ramp_steps=3, lr=0.5)


def test_probability_of_an_open_gate_is_the_share_of_draws() -> None:
    for log_alpha in (-3.0, 0.0, 2.0):
        draws = hard_concrete.sample(torch.full((40_000,), log_alpha))
        share = float((draws > 0).float().mean())
        expected = float(hard_concrete.open_probability(torch.tensor(log_alpha)))
        assert share == pytest.approx(expected, abs=0.01)  # four standard errors


def test_decided_gates_close_as_many_as_expected_and_the_weakest() -> None:
    log_alpha = torch.tensor([4.6, -4.6, 4.6, -4.6, -4.0, 4.6])
    gates = hard_concrete.decide(log_alpha)
    expected = round(float(hard_concrete.open_probability(log_alpha).sum()))
    assert int((gates > 0).sum()) == expected == 3
    assert (gates > 0).tolist() == [True, False, True, False, False, True]
    assert int((hard_concrete.decide(log_alpha, multiple_of=2) > 0).sum()) in (2, 4)
    assert int((hard_concrete.decide(torch.full((5,), -9.0), at_least=2) > 0).sum()) == 2


def test_masked_norm_is_the_norm_of_the_open_channels() -> None:
    x, gates = torch.randn(3, 6), torch.tensor([1.0, 0, 0.9, 1.0, 0, 1.0])
    weight, bias = torch.randn(6), torch.randn(6)
    found = hard_concrete.masked_layer_norm(x, gates, weight, bias, 1e-5)
    kept = gates > 0
    expected = torch.nn.functional.layer_norm(
        (x * gates)[:, kept], (4,), weight[kept], bias[kept], 1e-5
    )
    torch.testing.assert_close(found[:, kept], expected)
    assert (found[:, ~kept] == 0).all()


def scrambled(model: torch.nn.Module, masks: Masks) -> None:
    """Random masks, and norms that are not at their start."""
    with torch.no_grad():
        for name, value in masks.named_parameters():
            if name != "multipliers":
                value.uniform_(-4.0, 4.0)
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(torch.randn_like(value) * 0.3)


@pytest.mark.parametrize(
    "vision", [{}, {"pre_norm": False}, {"pooling": "mean"}, {"last_block": "pooled"}]
)
def test_masked_and_pruned_models_agree(vision: dict[str, object]) -> None:
    clip = tiny_clip(layers=3)
    config = clip.model.config
    config = config.model_copy(update={"vision": config.vision.model_copy(update=vision)})
    model = type(clip.model)(config)
    model.load_state_dict(clip.model.state_dict(), strict=False)
    masks = Masks(config, HALF, config)
    attach_(model, masks)
    scrambled(model, masks)
    masks.decide()
    small, _ = pruned(model, masks)
    assert small.config.vision.width < 32 and small.config.text.width < 32
    pixels, tokens = torch.randn(4, 3, 32, 32), clip.tokenizer(["a", "red bar", "x" * 9, ""])
    with torch.no_grad():
        for ours, theirs in (
            (small.encode_image(pixels), model.encode_image(pixels)),
            (small.encode_text(tokens), model.encode_text(tokens)),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_expected_size_is_the_prunable_size_where_all_gates_are_open() -> None:
    config = tiny_clip().model.config
    masks = Masks(config, HALF, config)
    with torch.no_grad():
        for value in masks.image.parameters():
            value.fill_(50.0)
    size = float(masks.image.expected_size())
    assert size == pytest.approx(prunable_size(config.vision), rel=1e-6)
    width, layers = 32, 2
    # four square matrices with biases, and the two of an MLP of twice the width without
    assert size == layers * (4 * width**2 + 4 * width + 4 * width**2)


def test_no_mask_is_lost_for_ever() -> None:
    config = tiny_clip().model.config
    masks = Masks(config, HALF, config)
    with torch.no_grad():
        masks.image.hidden.copy_(torch.linspace(-50, 50, 32))
    masks.draw()
    limit = math.log(100)
    assert float(masks.image.hidden.detach().min()) == pytest.approx(-limit)
    assert float(masks.image.hidden.detach().max()) == pytest.approx(limit)
    masks.multipliers.data.fill_(70.0)
    masks.draw()
    assert masks.multipliers.tolist() == [70.0, 70.0]


def test_the_budget_pushes_only_while_it_is_missed() -> None:
    config = tiny_clip().model.config
    masks = Masks(config, HALF, config)
    assert float(masks.loss(0).detach()) == 0.0  # the target starts where the model is
    gap = 0.5 - float(masks.sparsity().detach())
    assert float(masks.loss(99).detach()) == pytest.approx(10 * gap + 10 * gap**2, rel=1e-5)
    already = Masks(config, HALF, tiny_clip(width=64).model.config)
    assert already.start > 0.7 and float(already.loss(99).detach()) == 0.0


def test_training_meets_the_budget_prunes_and_goes_on(
    work: Work, tmp_path: Path, loss_at: Callable[[Path, int], float]
) -> None:
    inherit = Inherit(keep=0.5, prune_step=30, ramp_steps=15, lr=0.4, multiple_of=4)
    cfg = distill.Config(steps=40, inherit=inherit, **SHORT)
    student = distill.run(work, cfg, tmp_path).clip.model
    whole = work.teacher.model.config
    size = prunable_size(student.config.vision) + prunable_size(student.config.text)
    share = size / (prunable_size(whole.vision) + prunable_size(whole.text))
    assert 0.1 < share < 0.6
    assert student.config.vision.width % 4 == 0
    assert math.isfinite(loss_at(tmp_path, 39))
    assert student.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 16)


@pytest.mark.parametrize("every", [2, 5])
def test_resume_before_and_after_the_cut_is_bit_identical(
    work: Work, tmp_path: Path, every: int
) -> None:
    """With checkpoints every 2 steps the last one is after the cut, with 5 steps before it."""
    inherit = HALF.model_copy(update={"prune_step": 6})
    settings = {"inherit": inherit, "checkpoint_every": every, "bank_every": 1, **SHORT}
    cfg = distill.Config(steps=9, **settings)
    whole = distill.run(work, cfg, tmp_path).clip.model
    resumed = distill.run(work, cfg, tmp_path).clip.model
    assert resumed.config == whole.config
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_moments_are_cut_as_the_weights_are(work: Work, tmp_path: Path) -> None:
    cfg = distill.Config(inherit=HALF, views=1, **SHORT)
    clip = replace(work.clip, model=copy.deepcopy(work.clip.model))
    learner = distill.Learner(clip, cfg, (16,), work.teacher.model.config)
    state = State(learner, Training(precision="fp32"), {}, learner)
    assert learner.masks is not None
    scrambled(learner.student, learner.masks)
    for parameter in learner.parameters():
        parameter.grad = torch.rand_like(parameter)
    for optimizer in state.optimizers:
        optimizer.step()
    name = "student.text.blocks.1.mlp.down.weight"
    before = dict(learner.named_parameters())[name]
    moment = state.optimizers[0].state[before]["exp_avg"].clone()
    learner.masks.decide()
    gates = learner.masks.text.gates
    kept = [(gates[key] > 0).nonzero()[:, 0] for key in ("hidden", "mlp.1")]
    state.operate()
    after = dict(learner.named_parameters())[name]
    expected = moment[kept[0]][:, kept[1]]
    assert after.shape == expected.shape != moment.shape
    assert torch.equal(state.optimizers[0].state[after]["exp_avg"], expected)
    assert state.average[name].shape == after.shape
    assert not any("masks" in key for key, _ in learner.named_parameters())


def size_of(config: ClipConfig) -> float:
    return sum(prunable_size(tower) for tower in plain_configs(config))


def settled(model: ClipModel, inherit: Inherit, whole: ClipConfig) -> Masks:
    """Masks and multipliers trained on their budget alone, up to `prune_step`."""
    masks = Masks(model.config, inherit, whole)
    [adamw] = optimizers(masks, Training(), masks.groups())
    for step in range(inherit.prune_step):
        masks.draw()
        masks.loss(step).backward()
        adamw.step()
        adamw.zero_grad()
    return masks


def test_a_two_sided_budget_is_met_by_every_stage() -> None:
    """Each stage starts from what the one before has left and counts from the whole model. The
    one-sided budget is only kept from above: it lets go of what has gone too far.
    """
    model = whole = tiny_clip(width=64).model
    for keep in (0.75, 0.5, 0.25):
        two_sided = Inherit(keep=keep, prune_step=400, ramp_steps=200, lr=0.1, two_sided=True)
        masks = settled(model, two_sided, whole.config)
        assert 1 - float(masks.sparsity().detach()) == pytest.approx(keep, abs=0.01)
        masks.decide()
        model, _ = pruned(model, masks)
        share = size_of(model.config) / size_of(whole.config)
        assert share == pytest.approx(keep, abs=0.04)  # half a head of 8 is 1/32 of attention
    one_sided = Inherit(keep=0.5, prune_step=400, ramp_steps=200, lr=0.1)
    left = 1 - float(settled(whole, one_sided, whole.config).sparsity().detach())
    assert 0.3 < left < 0.49


def test_progressive_stages_count_from_the_recipes_model(work: Work, tmp_path: Path) -> None:
    """With training; so few steps overshoot the budget, see above for how it is met."""
    sizes = []
    for stage, keep in enumerate((0.75, 0.15)):
        inherit = Inherit(keep=keep, prune_step=25, ramp_steps=15, lr=0.5)
        cfg = distill.Config(steps=27, inherit=inherit, **SHORT)
        work = distill.run(work, cfg, tmp_path / str(stage))
        sizes.append(size_of(work.clip.model.config))
    total = size_of(work.teacher.model.config)
    assert sizes[0] / total < 0.85 and sizes[1] / total < 0.25 and sizes[1] < sizes[0]


def test_towers_of_another_design_are_refused() -> None:
    config = tiny_clip().model.config
    text = config.text.model_copy(update={"post_norm": True})
    with pytest.raises(PocketclipError, match=r"distill\.inherit needs two pre-norm"):
        Masks(config.model_copy(update={"text": text}), HALF, config)
