"""The matrix of targets: claims of hand-made rows, the page, and that the page is up to date."""

import json
from typing import Any

import pytest

from benchmarks import target_claims, target_matrix
from benchmarks.experiments import targets


def row(source: str, target: str, tower: str, **figures: Any) -> dict[str, Any]:
    about = {"source": source, "target": target, "precision": "fp32", "tower": tower}
    passed = {"passed": True, "kind": "executed", "reason": None, "worst_cosine": 0.99991}
    return about | passed | {"seconds": 10.0} | figures


FAILED = {"passed": False, "kind": "refused", "reason": "litert fp32, text tower: too far"}
ROWS = [
    row(targets.STUDENT, "litert", "image"),
    row(targets.STUDENT, "litert", "text", **FAILED),
    row(targets.STUDENT, "openvino", "image", seconds=25.0, runtime={"delegates": 3}),
    row(targets.STUDENT, "openvino", "text"),
    row("ViT-B/16", "openvino", "image", weights_bytes=600, peak_memory_bytes=1500),
    row("ViT-B/16", "litert", "image", passed=False, kind="no source", reason="none"),
]


def test_claims_count_towers_seconds_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_claims, "LARGE_BYTES", 500)
    found = {claim["name"]: claim for claim in targets.claims(ROWS)}
    assert found["litert: towers shown to pass"]["value"] == 0.5
    assert not found["litert: towers shown to pass"]["holds"]
    assert found["openvino: towers shown to pass"]["value"] == 1
    time = found["embedded student to all installed targets, one precision each"]
    assert (time["value"], time["holds"]) == (35.0, True)
    memory = found["memory an export adds, over the weights, worst case"]
    assert (memory["value"], memory["rows"]) == (2.5, [4])


def test_what_was_not_run_shows_nothing() -> None:
    left = targets.not_run(targets.STUDENT, "onnx", "fp32", "time was over")
    found = {claim["name"]: claim for claim in targets.claims(ROWS + left)}
    assert found["onnx: towers shown to pass"]["value"] == 0
    assert "embedded student to all installed targets, one precision each" not in found


def test_left_out_cases_are_rows_with_their_reason(tmp_path: Any) -> None:
    kept = targets.kept_rows(targets.TEACHER, "onnx", None, tmp_path)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps([{"target": "onnx", "precision": None, "passed": True}]))
    rows = targets._gathered([targets.TEACHER], quick=False, minutes=20, folder=tmp_path)
    assert [row["source"] for row in rows if row["passed"]] == [targets.TEACHER]
    late = "not run: the 20 minutes of --minutes were over"
    reasons = {row["source"]: row["reason"] for row in rows if not row["passed"]}
    assert reasons.pop(targets.TEACHER) == late
    assert set(reasons.values()) == {"not run: this model was not among --sources"}


def test_first_precisions_come_before_second_ones() -> None:
    turns = targets._in_turn([targets.TEACHER, targets.STUDENT], quick=False)
    cases = targets._contract.cases()
    count = len({target for target, _ in cases})
    assert len({target for _, target, _ in turns[:count]}) == count
    assert {source for source, *_ in turns[count : 2 * count]} == {targets.STUDENT}
    assert [target for _, target, _ in turns[:3]] == ["onnx", "onnxruntime", "openvino"]
    assert len(turns) == len(set(turns)) == 2 * len(cases)


def test_page_shows_figures_reasons_and_gaps() -> None:
    result = {"rows": ROWS, "claims": targets.claims(ROWS), "command": "python -m x"}
    result |= {"date": "2026-11-22", "machine": {"cores": 2, "cpu": "X"}, "versions": {"a": "1"}}
    page = target_matrix.page(result)
    assert "| LiteRT | fp32 | 0.99991 | no model [1] |" in page
    assert "| LiteRT | fp32 | refused [2] |  |" in page
    assert "| OpenVINO | fp32 | 0.99991, 3 delegates | 0.99991 |" in page
    assert "2. litert fp32, text tower: too far" in page
    assert "falls short" in page


def test_last_words_of_a_crash_name_the_error_without_places(tmp_path: Any) -> None:
    (tmp_path / "log.txt").write_text(
        f"loading\nRuntimeError: no kernel in {targets.ROOT}/export\nbye\n"
    )
    said = targets._last_words(tmp_path / "log.txt", 1)
    assert said == "exit code 1: RuntimeError: no kernel in ./export"


@pytest.mark.skipif(not targets.RESULTS.exists(), reason="the experiment has not run yet")
def test_the_page_shows_the_committed_figures() -> None:
    result = json.loads(targets.RESULTS.read_text())
    assert targets.PAGE.read_text() == target_matrix.page(result)
