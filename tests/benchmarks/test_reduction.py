"""The reduction experiment's arithmetic, on rows and pictures that are easy to check by hand."""

import json
from typing import Any

import pytest
import torch
from tiny import tiny_clip

from benchmarks import survival
from benchmarks.experiments import _reduction_page, reduction
from compress.clip import Clip
from compress.schedule import Reduction, Site
from compress.stages.prune_tokens import reduced

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def with_schedule(method: str, keep: int = 8, guard: int = 0) -> Clip:
    sites = (Site(layer=0, keep=12), Site(layer=1, keep=keep))
    return reduced(tiny_clip(layers=3), Reduction(method=method, sites=sites, guard=guard))


def test_dropped_patches_weigh_nothing_and_kept_ones_one() -> None:
    weights = survival.surviving(with_schedule("topk"), PIXELS)
    assert weights.shape == (2, 16) and torch.equal(weights.sum(dim=1), torch.full((2,), 8.0))
    assert set(weights.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("method, guard", [("tome", 0), ("guarded", 4), ("evit", 0)])
def test_methods_that_merge_hold_something_of_every_patch(method: str, guard: int) -> None:
    weights = survival.surviving(with_schedule(method, guard=guard), PIXELS)
    assert (weights > 0).all()
    assert torch.equal(survival.lost_regions(weights), torch.zeros(2))


def test_a_region_is_lost_when_all_its_patches_are() -> None:
    weights = torch.ones(1, 16)
    weights[0, [0, 1, 4, 5, 10]] = 0
    assert float(survival.lost_regions(weights)) == 0.25


def rows() -> list[dict[str, Any]]:
    accuracy = {"part": "accuracy", "worst_lost_regions": 0.0}
    latency = {"part": "latency", "model": "B/16", "target": "onnxruntime"}
    full, best = {"variant": "full"}, {"variant": reduction.BEST, "macs": 0.5}
    exact = {"part": "exact", "largest_change": 2e-6}
    return [
        accuracy | {"arm": "none", "method": "none", "macs": 1, "split": "val", "top1": 0.7},
        accuracy
        | {
            "arm": "exact + guarded 0.75",
            "method": "guarded",
            "macs": 0.74,
            "split": "val",
            "top1": 0.69,
        },
        latency | full | {"precision": "fp32", "processor_p50_ms": 80.0, "macs": 1},
        latency | full | {"precision": "int8", "processor_p50_ms": 30.0, "macs": 1},
        latency | best | {"precision": "int8", "processor_p50_ms": 10.0},
        exact | {"table_bytes": 400, "saved_bytes": 400},
        {"part": "recovery", "artifact": "teacher", "split": "val", "top1": 0.7},
        {"part": "recovery", "artifact": "student", "split": "val", "top1": 0.71},
    ]


def test_claims_of_hand_made_rows() -> None:
    found = {claim["name"]: claim for claim in reduction.claims(rows())}
    value = {name.split(":")[0]: claim["value"] for name, claim in found.items()}
    assert value["default, 0.75 of the multiply-adds, no training"] == pytest.approx(0.01)
    assert value["default, 0.6 of the multiply-adds, after recovery"] == pytest.approx(-0.01)
    assert value["default"] == 0 and value["exact passes"] == 2e-6
    assert value["B/16"] == pytest.approx(8.0) and value["onnxruntime"] == pytest.approx(1.5)
    assert value["vocabulary trimming"] == 0
    short = [name for name, claim in found.items() if not claim["holds"]]
    assert short == ["default, 0.75 of the multiply-adds, no training: worst loss"]


def test_parts_that_were_not_run_claim_nothing() -> None:
    assert reduction.claims([]) == []


@pytest.mark.skipif(not _reduction_page.RESULTS.exists(), reason="no committed figures yet")
def test_the_page_shows_the_committed_figures() -> None:
    result = json.loads(_reduction_page.RESULTS.read_text())
    assert _reduction_page.PAGE.read_text() == _reduction_page.page(result)
    picture = _reduction_page.PAGE.parent / _reduction_page.PARETO
    assert picture.read_text() == _reduction_page.pareto(result["rows"])


def test_the_plots_have_a_point_for_each_arm() -> None:
    found = rows()
    assert _reduction_page.pareto(found).count("<circle") == 2
    assert "guarded" in _reduction_page.pareto(found)
