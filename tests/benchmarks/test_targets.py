"""The matrix of targets: claims of hand-made rows, the page, and that the page is up to date."""

import json
from typing import Any

import pytest

from benchmarks import target_matrix
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
    monkeypatch.setattr(targets, "LARGE_BYTES", 500)
    found = {claim["name"]: claim for claim in targets.claims(ROWS)}
    assert found["litert: towers that pass"]["value"] == 0.5
    assert not found["litert: towers that pass"]["holds"]
    assert found["openvino: towers that pass"]["value"] == 1
    time = found["embedded student to all installed targets, one precision each"]
    assert (time["value"], time["holds"]) == (35.0, True)
    memory = found["memory an export adds, over the weights, worst case"]
    assert (memory["value"], memory["rows"]) == (2.5, [4])


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
