"""Folding changes nothing in float, and cures what the extremes of single channels ruin."""

import copy

import pytest
import torch
from tiny import tiny_clip, tiny_data
from torch import Tensor

from compress import calibrate, ptq
from compress.equalize import equalize_
from compress.model import ClipModel
from compress.nn import quant, smooth
from compress.scheme import LayerScheme
from compress.stages import quantize

W8A8 = LayerScheme(weight_bits=8, act_bits=8)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> calibrate.Calibration:
    return calibrate.draw(tiny_clip(), tiny_data(tmp_path_factory.mktemp("data")), 8, 0)


def with_outliers(reach: float = 60.0) -> ClipModel:
    """A tiny model whose norms give some channels `reach` times the rest, undone by the weights."""
    model = copy.deepcopy(tiny_clip().model)
    with torch.no_grad():
        for tower in (model.image, model.text):
            for block in tower.blocks:
                for norm, linear in (
                    (block.norm1, block.attention.qkv),
                    (block.norm2, block.mlp.up),
                ):
                    norm.weight[::11] *= reach
                    norm.bias[::11] += reach
                    linear.weight[:, ::11] /= reach
    return model


def embeddings(model: ClipModel, calibration: calibrate.Calibration) -> Tensor:
    with torch.no_grad():
        return torch.cat(calibrate.embed(model, calibration))


@pytest.mark.parametrize("method", ["smooth", "repq", "clipped", "awq", "search"])
def test_folding_is_an_identity(method: str, calibration: calibrate.Calibration) -> None:
    model = with_outliers(5.0)
    layers = {
        name: W8A8
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks" in name
    }
    before = embeddings(model, calibration)
    weights = model.image.blocks[0].attention.qkv.weight.detach().clone()
    rows = calibrate.collect(model, list(layers), calibration, 256)
    taken, _ = equalize_(model, layers, rows, method)
    assert set(taken.values()) != {"none"}
    assert not torch.equal(model.image.blocks[0].attention.qkv.weight, weights)
    torch.testing.assert_close(embeddings(model, calibration), before, atol=1e-5, rtol=0)


def test_folded_rows_are_what_the_folded_layers_get(calibration: calibrate.Calibration) -> None:
    model = with_outliers(5.0)
    names = ["image.blocks.0.attention.qkv", "image.blocks.1.mlp.up", "text.blocks.0.attention.out"]
    rows = calibrate.collect(model, names, calibration, 128)
    equalize_(model, dict.fromkeys(names, W8A8), rows, "search")
    again = calibrate.collect(model, names, calibration, 128)
    for name in names:
        torch.testing.assert_close(rows[name], again[name], atol=1e-4, rtol=1e-4)


def test_reparameterised_codes_are_the_channelwise_ones() -> None:
    """RepQ's claim: one scale behind the folding gives each channel's own codes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 7, generator=generator) * torch.linspace(0.2, 5, 7) + 1
    low, high = x.amin(0), x.amax(0)
    folding = smooth.repq(low, high, 8)
    assert folding.low is not None and folding.high is not None
    scale, zero = quant.scale_and_zero(folding.low, folding.high, 8, False)
    moved = x / folding.factor + folding.shift
    found = quant.fake_quantize(moved, scale, zero, (0, 255))
    back = (found - folding.shift) * folding.factor
    channel, channel_zero = quant.scale_and_zero(low, high, 8, False)
    wanted = quant.fake_quantize(x, channel, channel_zero, (0, 255))
    # a value on the border between two codes may fall to either side
    assert ((back - wanted).abs() < 1e-5).float().mean() > 0.995
    assert ((back - wanted).abs() <= channel * 1.01).all()


def test_outliers_that_ruin_extremes_are_recovered(calibration: calibrate.Calibration) -> None:
    model = with_outliers()
    wanted = embeddings(model, calibration)

    def worst(**settings: object) -> float:
        cfg = quantize.Config(table_bits=None, weight_bits=8, **settings)
        made = ptq.quantize(
            model, quantize.plan(model, cfg), calibration, cfg.equalize, cfg.bias_correction
        )
        found = embeddings(made.model, calibration)
        return float(torch.cosine_similarity(wanted, found).min())

    assert worst(equalize="none", ranges="minmax", bias_correction=False) < 0.9
    assert worst() > 0.99


def test_a_shift_needs_a_rounded_zero_point() -> None:
    folding = smooth.repq(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, 1.0]), 8)
    assert folding.low is not None and folding.high is not None
    scale = (folding.high - folding.low) / 255
    zero = float(-folding.low / scale)
    assert zero == pytest.approx(round(zero), abs=1e-3)
