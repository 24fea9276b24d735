"""The quantize stage: what is planned, what is saved, and how near the rounded model stays."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_clip

import compress.clip
from compress import calibrate
from compress.batches import embed_names
from compress.clip import TorchEncoder
from compress.errors import PocketclipError
from compress.nn.fake import RoundedLinear
from compress.scheme import LayerScheme, Scheme
from compress.stages import quantize
from compress.stages.quantize import Config
from compress.twin import float_twin, with_scheme
from compress.work import Work
from export import _saturation


def worst_cosine(work: Work, cfg: Config, out: Path) -> float:
    made = quantize.run(work, cfg, out).clip
    calibration = calibrate.draw(work.clip, work.data, 8, 5)
    with torch.no_grad():
        both = [torch.cat(calibrate.embed(c.model, calibration)) for c in (work.clip, made)]
    return float(torch.cosine_similarity(*both).min())


def test_eight_bits_stay_near(work: Work, tmp_path: Path) -> None:
    assert worst_cosine(work, Config(), tmp_path) > 0.999
    assert worst_cosine(work, Config(act="dynamic"), tmp_path) > 0.999
    assert worst_cosine(work, Config(act_bits=None), tmp_path) > 0.9995


def test_fewer_bits_cost_more(work: Work, tmp_path: Path) -> None:
    near = [worst_cosine(work, Config(weight_bits=b, act_bits=b), tmp_path) for b in (3, 4, 6, 8)]
    assert near == sorted(near) and near[0] < 0.99


def test_every_matrix_and_the_table_get_an_entry(work: Work, tmp_path: Path) -> None:
    made = quantize.run(work, Config(), tmp_path).clip.model
    assert made.config.scheme is not None
    layers = made.config.scheme.layers
    matrices = {n for n, m in made.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(layers) == matrices | {"image.patch", "text.token"}
    assert made.config.scheme.executable and made.config.scheme.label == "w8a8"
    told = json.loads((tmp_path / "quantize.json").read_text())
    assert told["executable"] and told["image_cosine"][1] > 0.999
    assert set(told["layers"]) == set(layers)


@pytest.mark.parametrize("family", ["uniform", "repq", "twin", "ptf", "adalog"])
def test_research_families_are_simulated(work: Work, tmp_path: Path, family: str) -> None:
    cfg = Config(weight_bits=6, act_bits=6, family=family, attention=True)
    made = quantize.run(work, cfg, tmp_path).clip.model
    scheme = made.config.scheme
    assert scheme is not None and not scheme.executable
    assert "image.blocks.0.attention.probabilities" in scheme.layers
    assert worst_cosine(work, cfg, tmp_path) > 0.9


def test_saved_and_opened_it_computes_the_same(work: Work, tmp_path: Path) -> None:
    for cfg in (Config(), Config(weight_bits=4, act_bits=4, family="adalog", attention=True)):
        made = quantize.run(work, cfg, tmp_path).clip
        compress.clip.save(made, tmp_path / "saved")
        again = compress.clip.load(tmp_path / "saved")
        calibration = calibrate.draw(work.clip, work.data, 4, 1)
        torch.testing.assert_close(
            TorchEncoder(again).encode_image(calibration.pixels),
            TorchEncoder(made).encode_image(calibration.pixels),
        )
        assert again.model.config == made.model.config


def test_the_float_twin_has_the_rounded_weights(work: Work, tmp_path: Path) -> None:
    made = quantize.run(work, Config(act_bits=None, table_bits=None), tmp_path).clip
    twin = float_twin(made)
    assert twin.model.config.scheme is None
    assert not any(isinstance(m, RoundedLinear) for m in twin.model.modules())
    calibration = calibrate.draw(work.clip, work.data, 4, 1)
    torch.testing.assert_close(
        TorchEncoder(twin).encode_text(calibration.tokens),
        TorchEncoder(made).encode_text(calibration.tokens),
    )


def test_rescue_leaves_the_worst_layers_in_float(work: Work, tmp_path: Path) -> None:
    model = work.clip.model
    with torch.no_grad():
        model.image.blocks[1].mlp.down.weight[:, 3] *= 200
    cfg = Config(weight_bits=3, act_bits=3, rescue=0.1)
    made = quantize.run(work, cfg, tmp_path).clip.model
    told = json.loads((tmp_path / "quantize.json").read_text())
    assert 1 <= len(told["rescued"]) <= len(told["divergence"]) / 10
    worst = max(told["divergence"], key=lambda name: told["divergence"][name])
    assert worst in told["rescued"] and made.config.scheme is not None
    assert worst not in made.config.scheme.layers


def with_massive_neuron(work: Work) -> Work:
    """A model one of whose neurons fires at 300 and is read with a weight of a thousandth."""
    clip = tiny_clip(seed=3)
    with torch.no_grad():
        mlp = clip.model.image.blocks[0].mlp
        mlp.up.weight[5] *= 30
        mlp.up.bias[5] = 300.0
        mlp.down.weight[:, 5] *= 1e-2
    return replace(work, clip=clip)


def test_massive_activations_are_computed_in_float(work: Work, tmp_path: Path) -> None:
    spoilt = with_massive_neuron(work)
    lost = worst_cosine(spoilt, Config(float_neurons=0), tmp_path)
    made = quantize.run(spoilt, Config(), tmp_path).clip.model
    assert made.config.scheme is not None
    assert made.config.scheme.layers["image.blocks.0.mlp.down"].float_columns == (5,)
    others = [e.float_columns for n, e in made.config.scheme.layers.items() if "blocks.0" not in n]
    assert not any(others)
    assert lost < 0.99 < 0.998 < worst_cosine(spoilt, Config(), tmp_path)


def test_only_the_towers_asked_for_are_rounded(work: Work, tmp_path: Path) -> None:
    made = quantize.run(work, Config(towers=("image",)), tmp_path).clip.model
    assert made.config.scheme is not None
    assert all(name.startswith("image.") for name in made.config.scheme.layers)
    tokens = calibrate.draw(work.clip, work.data, 4, 1).tokens
    with torch.no_grad():
        assert torch.equal(made.encode_text(tokens), work.clip.model.encode_text(tokens))


def test_fixed_prompts_go_along_in_float(work: Work, tmp_path: Path) -> None:
    made = quantize.run(work, Config(towers=("image",)), tmp_path).clip
    names = [name for _, name in work.data.classes]
    templates = list(work.data.templates)
    assert made.classes is not None and made.classes.names == tuple(names)
    torch.testing.assert_close(made.classes.embeddings, embed_names(work.clip, names, templates))
    assert quantize.run(work, Config(), tmp_path).clip.classes is None


def test_what_cannot_work_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="act: dynamic needs act_bits 8"):
        Config(act="dynamic", act_bits=4)
    made = quantize.run(work, Config(), tmp_path)
    with pytest.raises(PocketclipError, match="has a scheme already"):
        quantize.run(made, Config(), tmp_path)
    wrong = Scheme(layers={"image.blocks.9.mlp.up": LayerScheme(weight_bits=8)})
    with pytest.raises(PocketclipError, match=r"scheme\.layers\.image\.blocks\.9\.mlp\.up"):
        with_scheme(tiny_clip().model, wrong)


def test_calibration_never_reads_the_evaluation_splits(work: Work, tmp_path: Path) -> None:
    blind = replace(work, data=replace(work.data, evaluate={}))
    a, b = (quantize.run(w, Config(), tmp_path).clip.model for w in (work, blind))
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 7),
        ({"weight_bits": 4, "act": "dynamic", "group": 32}, 7),
        ({"weight_bits": 4, "act_bits": 4, "attention": True}, 8),  # simulated: runs nowhere
        ({"act_bits": None}, 8),  # multiplied in float
        ({"act_bits": None, "weight_bits": 7}, 7),
    ],
)
def test_sums_of_pixels_cannot_overflow_without_vnni(settings: dict[str, Any], bits: int) -> None:
    made = quantize.plan(tiny_clip().model, Config(**settings))
    assert made["image.patch"].weight_bits == bits


def test_four_bit_weights_leave_nothing_that_overflows_without_vnni() -> None:
    made = quantize.plan(tiny_clip().model, Config(weight_bits=4, act="dynamic", group=32))
    assert _saturation.weight_bits(Scheme(layers=made)) == 7
