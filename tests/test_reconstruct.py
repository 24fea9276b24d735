"""Reconstruction brings a block's output nearer; QAT lets a quantized student learn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress import calibrate, ptq, reconstruct
from compress.clip import Clip
from compress.nn.fake import RoundedLinear
from compress.stages import distill, quantize
from compress.work import Work


def cosine(a: Clip, b: Clip, work: Work) -> float:
    calibration = calibrate.draw(a, work.data, 8, 3)
    with torch.no_grad():
        both = [torch.cat(calibrate.embed(clip.model, calibration)) for clip in (a, b)]
    return float(torch.cosine_similarity(*both).mean())


def test_reconstruction_comes_nearer_and_ends_on_the_grid(work: Work) -> None:
    cfg = quantize.Config(weight_bits=3, act_bits=8, ranges="minmax", bias_correction=False)
    calibration = calibrate.draw(work.clip, work.data, 8, 0)
    layers = quantize.plan(work.clip.model, cfg)
    made = ptq.quantize(work.clip.model, layers, calibration, "none", False)
    before = cosine(work.clip, replace(work.clip, model=made.model), work)
    settings = reconstruct.Config(iterations=60, batch_size=8, lr=3e-2)
    reconstruct.reconstruct_(made, calibration, settings, 0)
    assert cosine(work.clip, replace(work.clip, model=made.model), work) > before + 0.002
    for module in made.model.modules():
        if isinstance(module, RoundedLinear) and module.codes is not None:
            assert module.codes.soft is None


def rounded(work: Work, cfg: quantize.Config) -> tuple[ptq.Quantized, calibrate.Calibration]:
    calibration = calibrate.draw(work.clip, work.data, 8, 0)
    layers = quantize.plan(work.clip.model, cfg)
    return ptq.quantize(work.clip.model, layers, calibration, "none", False), calibration


def first_error(made: ptq.Quantized, calibration: calibrate.Calibration) -> float:
    """Of the first image block, whose input no other block changes."""
    _, wanted = reconstruct._block_io(made.folded.image, 0, calibration.pixels)
    _, found = reconstruct._block_io(made.model.image, 0, calibration.pixels)
    return float((found - wanted).square().sum(-1).mean())


@pytest.mark.parametrize("family", ["uniform", "adalog"])
def test_a_few_steps_are_better_than_the_nearest_codes(work: Work, family: str) -> None:
    cfg = quantize.Config(weight_bits=4, act_bits=4, attention=True, family=family)
    made, calibration = rounded(work, cfg)
    before = first_error(made, calibration)
    up = made.model.image.blocks[0].mlp.up
    nearest = up.weight.clone()
    settings = reconstruct.Config(iterations=30, batch_size=8, scale_lr=0)
    reconstruct.reconstruct_(made, calibration, settings, 0)
    assert first_error(made, calibration) < 0.9 * before
    # What stands before a logarithmic rounding learns too.
    assert not torch.equal(up.codes.codes(up.weight), up.codes.codes(nearest))


def test_a_block_that_gets_worse_stays_as_it_was(work: Work) -> None:
    made, calibration = rounded(work, quantize.Config(weight_bits=4, act_bits=4))
    before = made.model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    reconstruct.reconstruct_(
        made, calibration, reconstruct.Config(iterations=2, batch_size=1, scale_lr=50.0), 0
    )
    after = made.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_soft_rounding_starts_at_the_float_weight(work: Work) -> None:
    calibration = calibrate.draw(work.clip, work.data, 8, 0)
    layers = quantize.plan(work.clip.model, quantize.Config(weight_bits=4))
    made = ptq.quantize(work.clip.model, layers, calibration, "none", False)
    layer = made.model.image.blocks[0].mlp.up
    assert isinstance(layer, RoundedLinear) and layer.codes is not None
    layer.codes.soft = reconstruct.share(reconstruct._start(layer))
    inside = (layer.weight / layer.codes.scale[:, None]).abs() < 7
    torch.testing.assert_close(layer.rounded_weight()[inside], layer.weight[inside])


@pytest.mark.parametrize("bits", [3])
def test_a_quantized_student_trains(work: Work, tmp_path: Path, bits: int) -> None:
    teacher = tiny_clip()
    start = quantize.run(
        work, quantize.Config(weight_bits=bits, act_bits=bits), tmp_path / "q"
    ).clip
    cfg = distill.Config(
        steps=30, batch_size=8, warmup_steps=2, lr=3e-3, precision="fp32", feature=10.0,
        affinity=0.0, views=1, optimizer="muon",
    )  # fmt: skip
    made = distill.run(replace(work, clip=start), cfg, tmp_path / "d").clip
    assert made.model.config.scheme == start.model.config.scheme
    assert cosine(teacher, made, work) > cosine(teacher, start, work) + 0.01
    layers = [m for m in made.model.modules() if isinstance(m, RoundedLinear)]
    olds = [m for m in start.model.modules() if isinstance(m, RoundedLinear)]
    assert any(
        not torch.equal(a.codes.log_scale, b.codes.log_scale)
        for a, b in zip(layers, olds)
        if a.codes is not None and b.codes is not None
    )
