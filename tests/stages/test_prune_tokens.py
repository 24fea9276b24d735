"""Schedules from settings, the search, and refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from tiny import tiny_clip

from compress.errors import PocketclipError
from compress.inspect import num_macs
from compress.schedule import Reduction, Site
from compress.stages import _schedule_latency, _schedule_search
from compress.stages._schedule_latency import Latency
from compress.stages.prune_tokens import Config, run, schedule, share_of_macs
from compress.structure import VisionConfig
from compress.work import Work

B16 = VisionConfig(
    image_size=224,
    patch_size=16,
    width=768,
    head_width=64,
    heads=(12,) * 12,
    mlp_width=(3072,) * 12,
)


def test_the_weights_stay_and_the_schedule_is_noted(work: Work, tmp_path: Path) -> None:
    pruned = run(work, Config(method="topk", keep=0.5, at=(0,)), tmp_path).clip
    for name, value in work.clip.model.state_dict().items():
        assert torch.equal(pruned.model.state_dict()[name], value), name
    assert pruned.model.config.vision.reduction == Reduction(
        method="topk", sites=(Site(layer=0, keep=8),)
    )
    assert pruned.provenance[-1]["reduction"]["sites"] == [{"layer": 0, "keep": 8}]


def test_the_noted_line_gives_the_same_schedule_again(work: Work, tmp_path: Path) -> None:
    cfg = Config(keep=0.5, at=(0,), guard=0.25, proportional=False)
    first = run(work, cfg, tmp_path).clip.model.config
    [line] = yaml.safe_load((tmp_path / "schedule.yaml").read_text())
    again = run(work, Config(**line["prune_tokens"]), tmp_path).clip.model.config
    assert again == first


def test_evits_sites_and_a_share_of_the_multiply_adds_for_b16() -> None:
    reduction = schedule(B16, Config(method="evit", keep=0.7))
    assert [site.layer for site in reduction.sites] == [3, 7]
    assert all(site.keep % 8 == 0 for site in reduction.sites)
    three = schedule(B16, Config(method="evit", keep=0.7, at=(3, 6, 9)))
    assert share_of_macs(B16, three) == pytest.approx(0.659, abs=0.02)  # EViT's three stages
    for macs in (0.75, 0.6):
        found = share_of_macs(B16, schedule(B16, Config(macs=macs)))
        assert macs - 0.03 < found <= macs


def test_tomes_r_goes_in_every_block() -> None:
    reduction = schedule(B16, Config(method="tome", r=13))
    assert [site.keep for site in reduction.sites[:3]] == [183, 170, 157]
    assert share_of_macs(B16, reduction) == pytest.approx(0.588, abs=0.02)


def test_forecast_multiply_adds_are_those_of_the_model(work: Work, tmp_path: Path) -> None:
    wide = replace(work, clip=tiny_clip(layers=4, width=128))
    pruned = run(wide, Config(method="topk", keep=0.6, at=(0, 2)), tmp_path).clip.model.config
    counted = num_macs(pruned)["image"] / num_macs(wide.clip.model.config)["image"]
    assert pruned.vision.reduction is not None
    forecast = share_of_macs(pruned.vision, pruned.vision.reduction)
    assert counted == pytest.approx(forecast, abs=0.05)  # patches, projection, the sites' own


def without_measuring(monkeypatch: pytest.MonkeyPatch, site: float = 0.0) -> Latency:
    """A runtime in which a block costs a third of a tower, in proportion to its tokens."""
    shares = [0.25, 0.5, 0.75, 1.0]
    found = Latency(shares, [(1 - share) / 3 for share in shares], site)
    monkeypatch.setattr(_schedule_latency, "measured", lambda *given: found)
    return found


def test_the_search_reaches_its_latency_and_can_be_read(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = without_measuring(monkeypatch)
    wide = replace(work, clip=tiny_clip(layers=3))
    cfg = Config(method="evit", search={"latency": 0.75, "num_images": 8, "max_sites": 2})
    reduction = run(wide, cfg, tmp_path).clip.model.config.vision.reduction
    assert reduction is not None and 1 <= len(reduction.sites) <= 2
    keeps = {site.layer: site.keep for site in reduction.sites}
    assert _schedule_latency.share(wide.clip.model.config.vision, keeps, latency) <= 0.75
    assert (tmp_path / "search.json").exists()
    assert (tmp_path / "schedule.yaml").read_text().startswith("- prune_tokens: {method: evit")
    with pytest.raises(PocketclipError, match=r"1 sites reach .* not 0.1"):
        hopeless = Config(method="evit", search={"latency": 0.1, "num_images": 8, "max_sites": 1})
        run(wide, hopeless, tmp_path)


def test_sites_that_cost_more_than_they_save_are_not_taken(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(work, clip=tiny_clip(layers=3))
    cfg = Config(method="evit", search={"latency": 0.85, "num_images": 8, "max_sites": 3})
    without_measuring(monkeypatch, site=0.1)
    reduction = run(wide, cfg, tmp_path).clip.model.config.vision.reduction
    assert reduction is not None and len(reduction.sites) == 1
    without_measuring(monkeypatch, site=1.0)
    with pytest.raises(PocketclipError, match=r"reach 1\.00 of the latency at most"):
        run(wide, cfg, tmp_path)


def test_the_search_goes_as_far_as_the_nearest_names_stay(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_measuring(monkeypatch)
    wide = replace(work, clip=tiny_clip(layers=3))
    # Names so dense that untrained embeddings, which hardly move, change their nearest one.
    size = wide.clip.model.config.embed_dim
    middle = _schedule_search.embed(wide.clip, _schedule_search.calibration_pixels(wide, 4)).mean(0)
    dense = middle + 0.1 * torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    names = F.normalize(dense, dim=-1)
    monkeypatch.setattr(_schedule_search, "embed_names", lambda *given: names)

    def trace(agreement: float) -> list[dict[str, Any]]:
        search = {"agreement": agreement, "num_images": 16}
        run(wide, Config(method="topk", search=search), tmp_path)
        found: list[dict[str, Any]] = json.loads((tmp_path / "search.json").read_text())["steps"]
        return found

    loose, strict = trace(0.01), trace(0.8)
    assert all(step["agreement"] >= 0.8 for step in strict)
    assert loose[-1]["latency"] < strict[-1]["latency"] < 1


def test_a_search_has_one_budget() -> None:
    for search in ({}, {"latency": 0.5, "agreement": 0.9}):
        with pytest.raises(ValidationError, match="give one of latency, agreement"):
            Config(search=search)


def test_latency_is_measured_in_the_runtime(work: Work, tmp_path: Path) -> None:
    cfg = Config(search={"latency": 0.5})
    assert cfg.search is not None
    found = _schedule_latency.measured(work.clip, cfg, cfg.search, tmp_path)
    assert found.shares == [0.25, 0.5, 0.75, 1.0]
    assert found.saved[-1] == 0 and min(found.saved) >= 0 and found.site >= 0
    assert _schedule_latency.measured(work.clip, cfg, cfg.search, tmp_path) == found


def test_a_sites_own_cost_is_what_it_takes_beyond_fixed_places() -> None:
    found = _schedule_latency.of_milliseconds([12.0, 9.0, 6.5, 4.0, 7.1], B16)
    assert found.site == pytest.approx(0.05)
    assert found.shares == pytest.approx([56 / 196, 0.5, 154 / 196, 1.0])
    assert found.saved[0] == pytest.approx((1 - 4 / 12) / (12 - 1 / 3))


def test_users_of_patch_tokens_are_refused_unless_they_ask(work: Work, tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match="no longer one feature for each patch"):
        run(work, Config(keep=0.5, at=(0,), patch_tokens="used"), tmp_path)
    run(work, Config(keep=0.5, at=(0,), patch_tokens="used, reduce anyway"), tmp_path)


def test_two_schedules_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="give one of macs, keep, r, sites, search"):
        Config(keep=0.5, macs=0.5)
    with pytest.raises(ValidationError, match="not none"):
        Config()


def test_a_schedule_that_the_tower_cannot_follow_is_refused(work: Work, tmp_path: Path) -> None:
    cfg = Config(method="topk", sites=({"layer": 5, "keep": 8},))
    with pytest.raises(PocketclipError, match=r"prune_tokens: .*nothing would follow"):
        run(work, cfg, tmp_path)
    with pytest.raises(PocketclipError, match="r: 99 in each of 1 blocks is more than 16"):
        run(work, Config(method="tome", r=99), tmp_path)
