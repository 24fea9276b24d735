"""The page of results from figures set by hand."""

from benchmarks.results_page import page

RESULT = {
    "command": "python -m benchmarks.experiments.peers",
    "date": "2026-11-22",
    "machine": {"cores": 2, "cpu": "x"},
    "rows": [
        {"artifact": "nncf", "tower": "image", "p50_ms": 1.23456, "top1": 0.5},
        {"artifact": "olive", "unavailable": "failed"},
    ],
    "claims": [
        {
            "name": "faster",
            "goal": 2.5,
            "value": 2.0,
            "unit": "ratio",
            "better": "higher",
            "holds": False,
        },
        {"name": "steps", "goal": 9, "value": 7, "unit": "steps", "better": "lower", "holds": True},
    ],
}


def test_claims_rows_and_their_origin_are_on_the_page():
    text = page({"peers": RESULT, "other_thing": {**RESULT, "rows": []}})
    assert "## Peers" in text and "## Other thing" in text
    assert "| faster | at least 2.50x | 2.00x | falls short |" in text
    assert "| steps | at most 9 steps | 7 steps |  |" in text
    assert "| nncf | image | 0.5 | 1.235 |  |" in text and "| failed |" in text
    assert "`benchmarks/results/peers.json`" in text
