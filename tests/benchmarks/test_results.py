"""Every committed results file: its claims follow from its rows, and it says where it is from."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
FILES = sorted(RESULTS.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def recomputed(name: str) -> list[dict[str, Any]]:
    """The claims that the experiment's own code draws from the committed rows."""
    experiment, rows = import_module(f"benchmarks.experiments.{name}"), read(name)["rows"]
    if name == "first_light":
        return experiment.claims(rows, read("emoji_baseline"))
    return experiment.claims(rows)


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_claims_follow_from_the_rows(name: str) -> None:
    stored = read(name)["claims"]
    assert stored == json.loads(json.dumps(recomputed(name)))
    for claim in stored:
        better = claim["value"] >= claim["goal"]
        if claim["better"] == "lower":
            better = claim["value"] <= claim["goal"]
        assert claim["holds"] == better and claim["rows"], claim["name"]


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_a_result_says_where_it_is_from(name: str) -> None:
    result = read(name)
    assert result["command"].startswith(f"python -m benchmarks.experiments.{name}")
    assert "--quick" not in result["command"]
    assert {"cpu", "cores"} <= set(result["machine"]) and "torch" in result["versions"]
    assert result["date"] and result["seeds"]


def test_the_readme_shows_the_committed_figures() -> None:
    page = tables.README.read_text()
    assert tables.insert(page) == page, "run: python -m benchmarks.tables"


def test_first_light_claims_of_hand_made_rows() -> None:
    """Two seeds of an arm, figures that are easy to check by hand."""
    from benchmarks.experiments.first_light import claims

    def row(arm: str, seed: int, artifact: str, tower: str, **figures: Any) -> dict[str, Any]:
        place = {"target": "torch", "precision": "fp32", "num_params": 10, "size_bytes": 40}
        return {"arm": arm, "seed": seed, "artifact": artifact, "tower": tower} | place | figures

    ours, whole, runtime = "inheritance + affinity", "quickstart", {"target": "onnxruntime"}
    rows = [
        row(whole, 0, "teacher", "image", top1=0.5, top5=0.7, num_params=50),
        row(whole, 0, "teacher", "text", top1=0.5, top5=0.7, num_params=50),
        row(whole, 0, "student", "image", top1=0.42),
        row(whole, 0, "student", "text", top1=0.42),
        row(whole, 1, "student", "image", top1=0.38),
        row(ours, 0, "student", "image", top1=0.45),
        row(ours, 1, "student", "image", top1=0.35),
        row("scratch", 0, "student", "image", top1=0.2),
        row("scratch", 1, "student", "image", top1=0.3),
        row(whole, 0, "teacher", "image", **runtime, size_bytes=700, top1=0.5),
        row(whole, 0, "teacher", "text", **runtime, size_bytes=700, top1=0.5),
    ]
    int8 = {"target": "onnxruntime", "precision": "int8", "size_bytes": 50, "top1": 0.44}
    rows += [row(whole, 0, "student", t, **int8, speedup=8.0) for t in ("image", "text")]
    baseline = {"rows": [{"split": "held_out_style", "top1": 0.44, "top5": 0.6}]}
    value = {claim["name"]: claim["value"] for claim in claims(rows, baseline)}
    assert value["teacher, held-out style, top-1"] == 0.5
    assert value["teacher, held-out style, top-5, against the no-learning baseline's"] == 0.7
    assert value["teacher parameters over student parameters"] == pytest.approx(5.0)
    kept = "student keeps of the teacher's held-out-style top-1, mean of 2 seed(s)"
    assert value[kept] == pytest.approx(0.8)
    margin = "inheritance + affinity, worst seed, over scratch, best seed, top-1"
    assert value[margin] == pytest.approx(0.05)
    assert value["teacher fp32 files over student int8 files"] == pytest.approx(14.0)
    fast = "student int8 image tower's speed over the teacher's fp32 in ONNX Runtime, 1 thread"
    assert value[fast] == 8.0
