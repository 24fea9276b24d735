"""Claims of hand-made rows, and the parts of the experiment that need no training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_clip

from benchmarks import stages
from benchmarks.experiments import _quantization_bench as bench
from benchmarks.experiments import _quantization_kept as kept
from benchmarks.experiments import _quantization_page as quantization_page
from benchmarks.experiments import quantization
from benchmarks.experiments._quantization_arms import (
    EXECUTED,
    SIMULATED,
    with_massive_neurons,
    with_outlier_token,
    with_outliers,
)
from benchmarks.experiments._quantization_claims import claims
from compress.embeddings import Embeddings, Split
from compress.stages import quantize


def row(arm: str, top1: float, executed: bool, **more: Any) -> dict[str, Any]:
    figures = {"top1": top1, "text_to_image_r1": top1, "image_to_text_r1": top1}
    place = {"model": "teacher", "arm": arm, "executed": executed, "seed": 0}
    return place | figures | {"image_cosine": 0.5} | more


def test_claims_of_hand_made_rows() -> None:
    ort = {"runtime": "onnxruntime", "worst_cosine_to_simulation": 0.9995}
    rows = [
        row("float", 0.500, False),
        row("w8a8", 0.498, True, **ort),
        row("w8a8", 0.499, True, **ort),
        row("w8a8", 0.3, True, runtime="onnxruntime", unavailable="no such thing"),
        row("w4", 0.49, True, **ort),
        row("w4 rtn", 0.47, True, **ort),
        row("w4a4 repq", 0.30, False),
        row("w4a4 uniform", 0.35, False),
        row("mixed lrp", 0.33, False),
    ]
    found = {claim["name"]: claim for claim in claims(rows)}
    loss = found["teacher, onnxruntime, w8a8: loss of top1, executed"]
    assert loss["value"] == pytest.approx(0.0015) and loss["holds"]
    gained = found["teacher, onnxruntime: w4 over round-to-nearest at its size, top1, executed"]
    assert gained["value"] == pytest.approx(0.02) and gained["holds"]
    step = found["teacher: w4a4 repq over w4a4 uniform, top1, simulated"]
    assert step["value"] == pytest.approx(-0.05) and not step["holds"]
    mixed = found["teacher: mixed 4-bit by lrp over w4a4 repq, top1, simulated"]
    assert mixed["value"] == pytest.approx(0.03)
    one_sided = "teacher: mixed 4-bit by lrp over mixed random, top1, simulated"
    assert one_sided not in found
    assert found["teacher, onnxruntime, w8a8: worst cosine of executed to simulated"]["holds"]
    for claim in found.values():
        kinds = {rows[i]["executed"] for i in claim["rows"] if rows[i]["arm"] != "float"}
        assert len(kinds) == 1, claim["name"]


@pytest.mark.parametrize("arm", EXECUTED)
def test_what_is_called_executed_has_kernels(arm: str) -> None:
    cfg = quantize.Config.model_validate(EXECUTED[arm])
    entries = quantize.plan(tiny_clip().model, cfg).values()
    assert entries and all(entry.executable for entry in entries)


@pytest.mark.parametrize("arm", SIMULATED)
def test_what_is_called_simulated_has_none(arm: str) -> None:
    cfg = quantize.Config.model_validate(SIMULATED[arm])
    entries = quantize.plan(tiny_clip().model, cfg)
    bits = {entries[n].weight_bits for n in entries if n.endswith("mlp.up")}
    assert bits == {int(arm[1])} if arm[0] == "w" else bits == {4} and cfg.mixed
    assert not all(entry.executable for entry in entries.values())


def test_rows_are_kept_under_the_weights_they_are_of(tmp_path: Path) -> None:
    weights = tmp_path / "run" / bench.STUDENT / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"first")
    own = bench.Bench(tmp_path, True, tmp_path / "run")
    first = own.kept("float-student", "student")
    assert own.kept("float-student", "student") == first
    weights.write_bytes(b"second")
    assert own.kept("float-student", "student") != first
    assert own.kept("float-teacher", "teacher").parent != first.parent
    assert own.kept("latency", None) == tmp_path / "latency.json"


def test_committed_rows_of_the_same_weights_are_taken_over(tmp_path: Path) -> None:
    machine = {"cpu": "this one"}
    now = {"quantize_version": 2, "weights": {"teacher": "a", "student": "b"}, "machine": machine}
    names = {"float-teacher": "teacher", "float-student": "student", "latency-B": None}
    rows = [{"job": name, "arm": name} for name in names]
    files = {name: (model, tmp_path / f"{name}.json") for name, model in names.items()}
    results = tmp_path / "results.json"

    def taken(**differs: Any) -> set[str]:
        for _, path in files.values():
            path.unlink(missing_ok=True)
        results.write_text(json.dumps({**now, **differs, "rows": rows}))
        kept.take_over(results, files, now)
        return {name for name, (_, path) in files.items() if path.exists()}

    assert taken() == set(names)
    assert kept.rows_of("float-teacher", files["float-teacher"][1]) == rows[:1]
    assert taken(weights={"teacher": "a", "student": "c"}) == {"float-teacher", "latency-B"}
    assert taken(machine={"cpu": "another"}) == {"float-teacher", "float-student"}
    assert taken(quantize_version=1) == set()


def test_rows_that_nothing_replaces_stay(tmp_path: Path) -> None:
    results, own = tmp_path / "results.json", tmp_path / "own.json"
    names = ("float-teacher", "w8-student", "w4-teacher")
    rows: list[dict[str, Any]] = [{"job": name, "model": name.split("-")[1]} for name in names]
    rows[2]["quantize_version"] = 1
    weights = {"teacher": "a", "student": "b"}
    results.write_text(json.dumps({"quantize_version": 2, "weights": weights, "rows": rows}))
    now: dict[str, Any] = {"quantize_version": 2, "weights": {"teacher": "a"}, "machine": {}}
    assert kept.carried(results, now, ["float-teacher"]) == (rows[1:], {"student": "b"})
    both = {**now, "weights": {"teacher": "a", "student": "c"}}
    assert kept.carried(results, both, []) == (rows[2:], {})
    assert kept.carried(results, both, ["w4-teacher"]) == ([], {})
    older = [{"quantize_version": 2, **row} for row in rows]
    found, away = kept.carried(results, {**now, "quantize_version": 3}, [])
    assert away == {"student": "b"} and sorted(map(str, found)) == sorted(map(str, older))
    changed = {**both, "weights": {"teacher": "z", "student": "b"}}
    assert kept.carried(results, changed, []) == ([], {})
    kept.take_over(results, {"w4-teacher": ("teacher", own)}, now)
    assert not own.exists()


def test_kept_rows_stay_when_results_are_taken_over(tmp_path: Path) -> None:
    now: dict[str, Any] = {"quantize_version": 2, "weights": {"teacher": "a"}, "machine": {}}
    results, own = tmp_path / "results.json", tmp_path / "own.json"
    results.write_text(json.dumps({**now, "rows": [{"job": "float", "top1": 0.1}]}))
    own.write_text('[{"top1": 0.2}]')
    kept.take_over(results, {"float": ("teacher", own)}, now)
    assert kept.rows_of("float", own) == [{"job": "float", "top1": 0.2}]


def test_arms_are_chosen_in_the_order_of_the_beginnings(tmp_path: Path) -> None:
    every = quantization.jobs(bench.Bench(tmp_path, False), ("teacher", "student"), (0, 1))
    assert len({job.name for job in every}) == len(every)
    found = quantization.chosen(every, ["prompts-student", "float-teacher", "prompts-student-0"])
    assert [job.name for job in found] == [
        "prompts-student-0",
        "prompts-student-1",
        "float-teacher",
    ]
    assert len(quantization.chosen(every, [""])) == len(every)


def test_ties_are_counted_on_both_sides() -> None:
    classes = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    turned = np.array([0.1, 0.7849, 0.7863, 1.4])  # just below and just above 45 degrees
    images = np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)
    names, labels = ["a", "b", "a"], np.array([0, 0, 2, 1])
    split = Split("s", np.arange(4), [], np.arange(4), np.zeros((0, 4), bool), names, labels)
    ahead = bench.margins(Embeddings(split, images, images[:0], classes))
    assert (ahead > 0).tolist() == [True, True, False, True]  # equal names are one class
    found = bench.near_ties(ahead)
    assert found.pop("least_leads") == [round(float(lead), 6) for lead in sorted(ahead[[0, 1, 3]])]
    assert found == {"right_by_a_hair": 1, "wrong_by_a_hair": 1, "num_images": 4}


def test_massive_neurons_are_read_as_much_less() -> None:
    model = tiny_clip().model
    spoilt = with_massive_neurons(model)
    pixels = torch.randn(2, 3, 32, 32)
    reach = []
    for made in (model, spoilt):
        mlp = made.image.blocks[0].mlp
        mlp.down.register_forward_pre_hook(lambda _, x: reach.append(x[0].abs().amax((0, 1))))
        made.encode_image(pixels)
    assert reach[1][0] > 20 * reach[0][0] and torch.equal(reach[1][1:], reach[0][1:])


def test_an_outlier_token_alone_makes_its_neurons_fire() -> None:
    model = with_outlier_token(tiny_clip(width=64).model)
    fired: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    for block in model.image.blocks:
        block.mlp.down.register_forward_pre_hook(lambda _, x: fired.append(x[0].detach()))
        block.register_forward_hook(lambda _, given, out: ends.append(out.detach()))
    model.encode_image(torch.randn(2, 3, 32, 32))
    for hidden, out in zip(fired, ends, strict=True):
        reach = hidden[..., 1:].abs().amax()
        assert hidden[:, 1, 0].min() > 20 * reach
        others = torch.cat([hidden[:, :1, 0], hidden[:, 2:, 0]], dim=1)
        assert others.abs().max() < 1e-3
        norms = out.norm(dim=-1)
        assert norms[:, 1].min() > 10 * torch.cat([norms[:, :1], norms[:, 2:]], dim=1).max()


def test_injected_outliers_leave_the_function_as_it_is() -> None:
    model = tiny_clip().model
    spoilt = with_outliers(model, every=5)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            spoilt.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=0
        )
    norms = (spoilt.image.blocks[0].norm1, model.image.blocks[0].norm1)
    assert norms[0].weight.max() > 10 * norms[1].weight.max()


def test_the_page_keeps_executed_and_simulated_apart() -> None:
    ort = {"runtime": "onnxruntime", "worst_cosine_to_simulation": 0.9995}
    rows = [
        row("float", 0.5, False),
        row("w8a8", 0.4, True, **ort),
        row("w8a8", 0.6, True, **ort, seed=1),
        row("w4a4 repq", 0.3, False),
    ]
    about = {"command": "c", "date": "d", "machine": {"cores": 2, "cpu": "x"}, "seeds": [0, 1]}
    result = about | {"versions": {"torch": "2"}, "rows": rows, "claims": claims(rows)}
    page = quantization_page.tables(result)
    executed, _, simulated = page.partition("## Simulated")
    assert "| teacher | w8a8 | onnxruntime | 0.5000 ± 0.1414 |" in executed
    assert "repq" not in executed and "| teacher | w4a4 repq | 0.3000 |" in simulated
    tables, _, rest = simulated.partition("## Not measured yet")
    assert "w8a8 |" not in tables
    assert "Smaller indexes" not in page and "- time: ViT-B-16" in rest
    missing = rest.partition("## What was asked for")[0]
    assert "w8a8 (openvino)" in missing and "w8a8 (onnxruntime)" not in missing
    assert "w4a4 repq" not in missing and "w4a4 uniform" in missing
    assert "- student: every arm" in missing


def test_the_page_has_indexes_and_times() -> None:
    vectors = {"model": "teacher", "arm": "vectors int8", "seed": 0, "executed": False}
    rows = [
        row("float", 0.5, False),
        vectors | {"text_to_image_r1": 0.25, "bytes_per_vector": 64},
        vectors | {"model": "ViT-B-16", "arm": "latency x", "p50_ms": 12.34567, "min_ms": 11.0},
    ]
    lines = quantization_page._plain("## t", rows, quantization_page.VECTORS)[1].splitlines()
    assert lines[2:] == ["| teacher | vectors int8 | 0.25 | 64 |"]
    lines = quantization_page._plain("## t", rows, quantization_page.TIMES)[1].splitlines()
    assert lines[2:] == ["| ViT-B-16 | latency x | 12.35 | 11 |"]
    missing = quantization_page._missing(rows)
    assert "smaller indexes" not in missing.splitlines()[0] and "time: ViT-B-16" not in missing


def test_the_page_shows_the_committed_figures() -> None:
    if not quantization_page.RESULTS.exists():
        pytest.skip("no results are committed yet")
    page = quantization_page.PAGE.read_text()
    result = json.loads(quantization_page.RESULTS.read_text())
    assert quantization_page.insert(page, result) == page, (
        "run: -m benchmarks.experiments._quantization_page"
    )


def test_the_report_says_what_was_tried_and_why(tmp_path: Path) -> None:
    steps = [
        {"rung": "static int8", "reason": "loses 2.0% of top-1, 0.3% allowed"},
        {"rung": "dynamic int8", "reason": None},
    ]
    path = tmp_path / "fallback.json"
    assert stages._tried(path) == []
    path.write_text(json.dumps(steps))
    assert stages._tried(path) == [
        "static int8: loses 2.0% of top-1, 0.3% allowed",
        "dynamic int8: taken",
    ]
