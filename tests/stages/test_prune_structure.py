"""Structured pruning: what stays computes what it did, budgets hold, and nothing is half a head."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_clip

import compress.clip
from compress.errors import PocketclipError
from compress.importance import Place
from compress.inspect import num_macs
from compress.nn.slim import cheapest_to_lose
from compress.stages import _costs
from compress.stages.prune_structure import Config, cut, only_channels, only_layers, run
from compress.stages.prune_tokens import Config as Tokens
from compress.stages.prune_tokens import run as prune_tokens
from compress.work import Work

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
SHORT = {"batches": 2, "batch_size": 8}


def test_what_is_cut_equals_what_is_zero(work: Work) -> None:
    """A head whose output weights are 0 and a channel whose are 0 can go without a trace."""
    clip = work.clip
    block = clip.model.image.blocks[1]
    with torch.no_grad():
        block.attention.out.weight[:, 8:16] = 0
        block.mlp.down.weight[:, 8:24] = 0
    kept = {
        Place("image", 1, "heads"): [0, 2, 3],
        Place("image", 1, "mlp"): [n for n in range(64) if not 8 <= n < 24],
    }
    small = cut(clip, kept)
    assert small.model.config.vision.heads == (4, 3)
    assert small.model.config.vision.mlp_width == (64, 48)
    wanted = clip.model.encode_image(PIXELS)
    torch.testing.assert_close(small.model.encode_image(PIXELS), wanted, rtol=0, atol=1e-5)


def test_a_block_that_adds_nothing_can_go(work: Work) -> None:
    clip = replace(work, clip=tiny_clip(layers=3)).clip
    block = clip.model.text.blocks[1]
    with torch.no_grad():
        for layer in (block.attention.out, block.mlp.down):
            layer.weight.zero_()
            layer.bias.zero_()
    small = only_layers(clip, "text", [0, 2])
    tokens = clip.tokenizer(["red square"])
    wanted = clip.model.encode_text(tokens)
    torch.testing.assert_close(small.model.encode_text(tokens), wanted, rtol=0, atol=1e-6)


def test_the_residual_channels_that_stay_are_the_named_ones(work: Work) -> None:
    small = only_channels(work.clip, "image", [1, 5, 7, 9, 12, 20, 30, 31]).model
    large = work.clip.model
    assert small.config.vision.width == 8 and small.config.text.width == 32
    torch.testing.assert_close(
        small.image.blocks[0].mlp.down.weight,
        large.image.blocks[0].mlp.down.weight[[1, 5, 7, 9, 12, 20, 30, 31]],
    )
    assert small.encode_image(PIXELS).shape == (2, 16)


@pytest.mark.parametrize("measure", ["taylor", "activation", "module_drop", "upop"])
def test_the_budget_holds_and_the_model_can_be_saved(
    work: Work, tmp_path: Path, measure: str
) -> None:
    before = {n: v.clone() for n, v in work.clip.model.state_dict().items()}
    cfg = Config(importance=measure, keep=0.6, **SHORT)
    small = run(work, cfg, tmp_path).clip
    whole, cheaper = (sum(num_macs(c.model.config).values()) for c in (work.clip, small))
    assert 0.5 < cheaper / whole < 0.75  # patches and projections are not counted, and stay
    for config in (small.model.config.vision, small.model.config.text):
        assert all(width % 8 == 0 for width in config.mlp_width) and min(config.heads) >= 1
    for name, value in work.clip.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    compress.clip.save(small, tmp_path / "model")
    again = compress.clip.load(tmp_path / "model")
    assert torch.equal(again.model.encode_image(PIXELS), small.model.encode_image(PIXELS))


def test_blocks_and_width_are_cut_to_what_is_asked(work: Work, tmp_path: Path) -> None:
    deep = replace(work, clip=tiny_clip(layers=3))
    cfg = Config(keep=1, layers={"image": 2}, width={"text": 24}, **SHORT)
    small = run(deep, cfg, tmp_path).clip.model.config
    assert small.vision.num_layers == 2 and small.text.num_layers == 3
    assert small.text.width == 24 and small.vision.width == 32


def test_a_dead_head_goes_first(work: Work, tmp_path: Path) -> None:
    with torch.no_grad():
        work.clip.model.image.blocks[0].attention.out.weight[:, :8] = 0
    small = run(work, Config(keep=0.97, towers=("image",), **SHORT), tmp_path).clip.model
    assert small.config.vision.heads[0] == 3


def test_costs_are_measured_in_the_runtime(work: Work, tmp_path: Path) -> None:
    from compress.importance import gates_of

    gates = gates_of({"image": work.clip.model.image.blocks})
    found = _costs.by_latency(work.clip, gates, tmp_path)
    assert set(found) == set(gates.values) and min(found.values()) > 0
    assert _costs.by_latency(work.clip, gates, tmp_path) == found


def test_multiply_adds_of_a_head_are_those_of_the_model(work: Work) -> None:
    from compress.importance import gates_of

    place = Place("image", 0, "heads")
    cost = _costs.by_macs(work.clip, gates_of({"image": work.clip.model.image.blocks}), Path())
    fewer = cut(work.clip, {place: [0, 1, 2]}).model.config
    saved = num_macs(work.clip.model.config)["image"] - num_macs(fewer)["image"]
    assert cost[place] == saved


def test_the_cheapest_to_lose_go_by_score_for_cost() -> None:
    assert cheapest_to_lose([3.0, 1.0, 2.0], [3.0, 0.1, 4.0], 4.0) == [2]
    assert cheapest_to_lose([3.0, 1.0], [1.0, 1.0], 9.0) == [1, 0]


def test_what_cannot_be_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="30 is no multiple of 8"):
        Config(width={"image": 30})
    with pytest.raises(PocketclipError, match="fewer than 9"):
        run(work, Config(layers={"image": 9}, **SHORT), tmp_path)
    tokens = prune_tokens(work, Tokens(keep=0.5, at=(0,)), tmp_path)
    with pytest.raises(PocketclipError, match="put it before prune_tokens"):
        only_layers(tokens.clip, "image", [0])
