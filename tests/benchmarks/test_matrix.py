"""The page of models says what the committed results say."""

import json
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


@pytest.mark.skipif(not matrix.RESULTS.exists(), reason="the experiment has not run")
def test_the_page_is_drawn_from_the_committed_results() -> None:
    stored = json.loads(matrix.RESULTS.read_text())
    assert matrix.PAGE.read_text() == matrix.page(stored), "run: python -m benchmarks.matrix"
