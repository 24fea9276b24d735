"""Claims about latencies of rows set by hand."""

import pytest

from benchmarks.experiments.latency import claims


def row(repeat, path, p50, half=0.01):
    interval = [p50 * (1 - half), p50 * (1 + half)]
    return {
        "repeat": repeat,
        "path": path,
        "tower": "image",
        "p50_ms": p50,
        "p50_ms_ci95": interval,
    }


def test_claims_of_hand_made_rows():
    rows = [row(0, "a", 1.0), row(0, "b", 2.0), row(0, "c", 2.02)]
    rows += [row(1, "a", 1.1), row(1, "b", 2.1, half=0.02), row(1, "c", 2.05)]
    other = {"path": "a", "tower": "image", "tool": "x"}
    rows += [
        {**other, "repeat": 0, "p50_ms_other": 1.1},
        {**other, "repeat": 1, "p50_ms_other": 1.1},
    ]
    value = {claim["name"]: claim for claim in claims(rows)}
    assert value["widest 95 % interval of a median"]["value"] == pytest.approx(0.04)
    assert not value["widest 95 % interval of a median"]["holds"]
    assert value["pairs of artifacts whose order changed between repeats"]["value"] == 0
    apart = value["largest difference to the other tools' medians"]
    assert apart["value"] == pytest.approx(0.05)  # 1.1 and 1.0 of ours, in the same repeats
    assert apart["rows"] == list(range(8))


def test_order_that_changes_is_counted_once():
    rows = [row(0, "a", 1.0), row(0, "b", 2.0), row(1, "a", 2.0), row(1, "b", 1.0)]
    assert claims(rows)[1]["value"] == 1
