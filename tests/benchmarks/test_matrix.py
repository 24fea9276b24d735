"""The page of models says what the committed results say."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import matrix
from benchmarks.experiments import models


def result() -> dict[str, Any]:
    shared = {"config": "small", "text_difference": 2e-7, "num_wrong_ids": 0, "saves": "yes"}
    plain = {"family": "plain", "image_difference": 1e-6, "distils": "yes", "prunes": "yes"}
    other = {"family": "other", "image_difference": 3e-4, "distils": "yes", "prunes": "needs a ViT"}
    rows = [
        {**shared, **plain, "quantizes": "yes", "exports": {"onnx": "yes"}},
        {**shared, **other, "quantizes": "needs a ViT", "exports": {"onnx": "no such operator"}},
        {"config": "memory", "name": "ViT-B-16", "peak_over_weights": 1.1},
    ]
    return {
        "command": "python -m benchmarks.experiments.models",
        "date": "2026-11-22",
        "machine": {"cores": 2, "cpu": "a CPU"},
        "versions": {"torch": "2"},
        "rows": rows,
        "missing": ["small: third"],
        "claims": models.claims(rows),
    }


def test_reasons_are_numbered_once() -> None:
    shown = matrix.page(result())
    assert "| plain | 1e-06, 2e-07 | yes | yes | yes | yes |" in shown
    assert "| other | 3e-04, 2e-07 | yes | yes | no (1) | no (1) |" in shown
    assert "| other | no (2) |" in shown and "2. no such operator" in shown
    assert "not run\n\n- small: third\n" in shown


def test_claims_take_the_worst_row() -> None:
    found = {claim["name"]: claim for claim in result()["claims"]}
    image = found["image embeddings, largest difference to upstream"]
    assert (image["value"], image["holds"], image["rows"]) == (3e-4, False, [0, 1])
    assert found["peak memory of loading ViT-B/16 over its weights"]["holds"]
    assert "exported folders opened again, difference" not in found


def test_a_crashed_export_is_noted_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second target's converter takes its process with it; a later call adds a third."""
    place = tmp_path / "small--plain.json"
    place.write_text(json.dumps({"config": "small", "exports": {}}))

    def crashing(function: Any, arguments: Any, log: Path) -> str | None:
        kept, targets = arguments[1].with_suffix(".json"), arguments[3]
        row = json.loads(kept.read_text())
        for target in models._lacking(row, targets):
            if target == "fragile":
                kept.write_text(json.dumps(row))
                return "exit code -11: bye"
            row["exports"][target] = "yes"
        kept.write_text(json.dumps(row))
        return None

    monkeypatch.setattr(models._forked, "call", crashing)
    monkeypatch.setattr(models, "arms", lambda quick: {"small: plain": None, "full: no": None})
    models.run_arms(tmp_path, True, ["onnx", "fragile", "web"], 1e-9)
    assert json.loads(place.read_text())["exports"] == {}
    (tmp_path / "full--no.json").write_text('{"config": "full"}')
    rows, missing = models.run_arms(tmp_path, True, ["onnx", "fragile"], 9)
    wanted = {"onnx": "yes", "fragile": "its converter crashed (exit code -11: bye)"}
    assert rows[0]["exports"] == wanted and not missing
    rows, _ = models.run_arms(tmp_path, True, ["web", "fragile"], 9)
    assert rows[0]["exports"] == {**wanted, "web": "yes"}


def test_committed_rows_stand_where_none_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"arm": "small: plain", "config": "small", "exports": {"onnx": "yes"}}]
    (tmp_path / "models.json").write_text(json.dumps({"rows": rows}))
    models.take_committed(tmp_path, tmp_path / "models.json")
    monkeypatch.setattr(models, "arms", lambda quick: {"small: plain": None})
    monkeypatch.setattr(models._forked, "call", None)
    assert models.run_arms(tmp_path, False, ["onnx"], 9) == (rows, [])
    (tmp_path / "small--plain.json").write_text("{}")
    models.take_committed(tmp_path, tmp_path / "models.json")
    assert models.run_arms(tmp_path, False, ["onnx"], 9) == ([{}], [])


@pytest.mark.skipif(not matrix.RESULTS.exists(), reason="the experiment has not run")
def test_the_page_is_drawn_from_the_committed_results() -> None:
    stored = json.loads(matrix.RESULTS.read_text())
    assert matrix.PAGE.read_text() == matrix.page(stored), "run: python -m benchmarks.matrix"
