"""The reduction experiment's arithmetic, on rows and pictures that are easy to check by hand."""

import itertools
import json
from argparse import Namespace
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tiny import tiny_clip

from benchmarks import machine, survival
from benchmarks.experiments import _reduction_accuracy as accuracy
from benchmarks.experiments import _reduction_claims as claims
from benchmarks.experiments import _reduction_latency as latency
from benchmarks.experiments import _reduction_page, _reduction_parity, _reduction_tokens, reduction
from benchmarks.experiments._reduction_pareto import pareto
from compress.clip import Clip
from compress.schedule import Method, Reduction, Site
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


def trained(seed: int, top1: float) -> dict[str, Any]:
    row = {"part": "recovery", "arm": "recovered 0.60", "artifact": "student", "macs": 0.59}
    return row | {"split": "val", "seed": seed, "top1": top1}


def rows() -> list[dict[str, Any]]:
    accuracy = {"part": "accuracy", "worst_lost_regions": 0.0}
    latency = {"part": "latency", "model": "B/16", "target": "onnxruntime"}
    full, best = {"variant": "full"}, {"variant": claims.BEST, "macs": 0.5}
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
        *[trained(seed, top1) for seed, top1 in enumerate((0.70, 0.72))],
        {"part": "parity", "passed": True, "kind": "executed"},
        {"part": "parity", "passed": False, "kind": "unavailable"},
        {"part": "parity", "passed": False, "kind": "refused"},
    ]


def test_claims_of_hand_made_rows() -> None:
    found = {claim["name"]: claim for claim in reduction.claims(rows())}
    value = {name.split(":")[0]: claim["value"] for name, claim in found.items()}
    assert value["default, 0.75 of the multiply-adds, no training"] == pytest.approx(0.01)
    assert value["default, 0.6 of the multiply-adds, after recovery"] == pytest.approx(-0.01)
    assert value["default"] == 0 and value["exact passes"] == 2e-6
    assert value["B/16"] == pytest.approx(8.0) and value["onnxruntime"] == pytest.approx(1.5)
    assert value["vocabulary trimming"] == 0 and value["reduced models"] == 1
    short = [name for name, claim in found.items() if not claim["holds"]]
    assert short == [
        "default, 0.75 of the multiply-adds, no training: worst loss",
        "reduced models: cases of method, runtime and precision that miss their parity gate",
    ]


def test_parts_that_were_not_run_claim_nothing() -> None:
    assert reduction.claims([]) == []


@pytest.mark.skipif(not _reduction_page.RESULTS.exists(), reason="no committed figures yet")
def test_the_page_shows_the_committed_figures() -> None:
    result = json.loads(_reduction_page.RESULTS.read_text())
    assert _reduction_page.PAGE.read_text() == _reduction_page.page(result)
    picture = _reduction_page.PAGE.parent / _reduction_page.PARETO
    assert picture.read_text() == pareto(result["rows"])


def test_the_plot_has_a_panel_for_each_task_and_a_point_for_each_arm() -> None:
    both = rows() + [row | {"split": "held_out_style"} for row in rows()]
    found = pareto(both)
    assert found.count("<title>none: 70.0%") == 2
    assert found.count("<title>exact + guarded 0.75: 69.0%, 0.74") == 2
    assert ">held-out style<" in found and "share of multiply-adds" in found
    arm = {"part": "latency", "model": "emoji teacher", "variant": "none", "processor_p50_ms": 2.0}
    timed = pareto([*both, arm, arm | {"variant": "exact + guarded 0.75", "processor_p50_ms": 1.5}])
    assert "69.0%, 1.5" in timed and "ms, ONNX Runtime int8" in timed


def test_committed_rows_stand_while_their_sites_do() -> None:
    sites = [{"layer": 0, "keep": 8}]
    own = {"arm": "a", "sites": sites, "split": "val"}
    committed = [own, own | {"arm": "b"}, own | {"sites": []}]
    found = Reduction(method="topk", sites=(Site(layer=0, keep=8),))
    assert accuracy._standing(committed, "a", found) == [own]


def test_recovery_is_shown_with_its_range() -> None:
    found = [trained(seed, top1) for seed, top1 in enumerate((0.70, 0.72))]
    found += [row | {"split": "held_out_style"} for row in found]
    found += [row | {"artifact": "start", "top1": 0.6} for row in found]
    lines = _reduction_page._recovery(found)
    spread = "71.0% (70.0% to 72.0%)"
    assert f"| recovered 0.60, after | 0.59 | 2 | {spread} | {spread} |" in lines
    assert "| recovered 0.60, before | 0.59 | 2 | 60.0% | 60.0% |" in lines


def test_parity_asks_every_method_of_every_runtime_and_every_precision_of_the_default() -> None:
    found = _reduction_parity.cases()
    small = {(m, target) for model, m, target, _ in found if model == _reduction_parity.SMALL}
    assert small == set(itertools.product(get_args(Method), _reduction_parity.RUNTIMES))
    precisions = {(t, p) for model, _, t, p in found if model == _reduction_parity.TEACHER}
    assert {("openvino", "int8"), ("onnxruntime", "int8"), ("litert", "fp32")} <= precisions


def test_a_crash_costs_one_case_and_the_next_goes_on(tmp_path, monkeypatch) -> None:
    """The second of three cases crashes its process; what the first has written stays."""
    small, asked = _reduction_parity.SMALL, []
    chosen = [(small, method, "onnx", None) for method in ("tome", "evit", "grid")]
    monkeypatch.setattr(_reduction_parity, "cases", lambda quick: chosen)

    def call(function, arguments, log):
        cases, folder = arguments
        asked.append([method for _, method, _, _ in cases])
        for case in cases:
            if case[1] == "evit":
                return "exit code -11: gone"
            rows = [
                {"target": "onnx", "tower": tower, "passed": True} for tower in ("image", "text")
            ]
            _reduction_parity._path(folder, case).write_text(json.dumps(rows))
        return None

    monkeypatch.setattr(_reduction_parity._forked, "call", call)
    rows = _reduction_parity.measure(tmp_path, quick=False)
    assert [(row["method"], row["passed"]) for row in rows] == [
        ("tome", True), ("evit", False), ("grid", True)
    ]  # fmt: skip
    assert rows[1]["reason"] == "exit code -11: gone"
    assert asked == [["tome", "evit", "grid"], ["grid"]]
    assert _reduction_parity.measure(tmp_path, quick=False) == rows and len(asked) == 2


def test_only_what_was_measured_again_is_replaced() -> None:
    given = Namespace(parts=["latency", "recovery"], models=["B/16"], trained=["a"], seeds=[1])
    kept = [
        {"part": "exact"},
        {"part": "latency", "model": "B/32"},
        {"part": "recovery", "arm": "a", "seed": 0},
        {"part": "recovery", "arm": "b", "seed": 1},
    ]
    gone = [{"part": "latency", "model": "B/16"}, {"part": "recovery", "arm": "a", "seed": 1}]
    assert [row for row in kept + gone if not reduction.replaced(row, given)] == kept


def test_the_floor_is_the_time_of_one_token() -> None:
    row = {"part": "tokens", "target": "onnxruntime", "layers": 6, "width": 768, "cpu": "Z80"}
    times = {("int8", 1): 2.0, ("int8", 197): 8.0, ("fp32", 1): 3.0, ("fp32", 197): 30.0}
    found = [
        row | {"precision": precision, "tokens": tokens, "processor_p50_ms": ms}
        for (precision, tokens), ms in times.items()
    ]
    floors = {("onnxruntime", "int8"): 0.25, ("onnxruntime", "fp32"): 0.1}
    assert _reduction_tokens.floors(found) == floors
    lines = _reduction_page._tokens(found)
    assert "| 1 | 2.00 | 3.00 |" in lines and "| 1, of the most | 25% | 10% |" in lines
    assert any("one thread, Z80:" in line for line in lines)


def test_times_say_on_which_processor() -> None:
    samples = np.array([[2.0, 1.0], [4.0, 3.0], [3.0, 2.0]])
    timed = latency.medians(samples)
    assert timed == {"p50_ms": 3.0, "processor_p50_ms": 2.0, "num_queries": 3} | {
        "cpu": machine.short()
    }
    row = {"part": "latency", "model": "B/16", "variant": "full", "target": "onnxruntime"}
    lines = _reduction_page._latency([row | timed | {"precision": "fp32", "macs": 1.0}])
    assert lines[-2].endswith(f"| 2.0 | 1.00x | {machine.short()} |")
    fast = {**row, **timed, "precision": "int8", "macs": 1.0, "processor_p50_ms": 0.5}
    lines = _reduction_page._latency([row | timed | {"precision": "fp32", "macs": 1.0}, fast])
    assert f"4.00x (B/16, {machine.short()})" in lines[-2]


def test_the_chain_multiplies_every_token_by_every_matrix() -> None:
    made = _reduction_tokens.chain(3)
    weights = [onnx.numpy_helper.to_array(weight) for weight in made.graph.initializer]
    pixels = np.random.default_rng(1).normal(size=(1, 3, _reduction_tokens.WIDTH))
    wanted = pixels = pixels.astype(np.float32)
    for weight in weights:
        wanted = wanted @ weight
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"pixels": pixels})
    assert len(weights) == 24 and np.abs(found - wanted).max() < 1e-3


def test_a_fast_file_that_computes_something_else_makes_no_claim() -> None:
    wrong = [row | {"cosine": 0.95} if row.get("variant") == claims.BEST else row for row in rows()]
    names = {claim["name"] for claim in claims.claims(rows())}
    speed = "B/16: int8 + tokens + exact passes over ONNX Runtime fp32, 1 thread"
    assert speed in names
    assert speed not in {claim["name"] for claim in claims.claims(wrong)}
