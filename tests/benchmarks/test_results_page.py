"""The page of results from figures set by hand."""

import re

import pytest

from benchmarks import results_tables, scaling_plots
from benchmarks.results_page import _figures, page

RESULT = {
    "command": "python -m benchmarks.experiments.peers",
    "date": "2026-11-22",
    "machine": {"cores": 2, "cpu": "x"},
    "rows": [
        {
            "artifact": "nncf",
            "tower": "image",
            "target": "openvino",
            "p50_ms": 1.23456,
            "p50_ms_ci95": [1.2, 1.3],
            "size_bytes": 3_000_000,
            "top1": 0.5,
        },
        {
            "artifact": "nncf",
            "tower": "text",
            "p50_ms": 0.5,
            "p50_ms_ci95": [0.5, 0.5],
            "size_bytes": 1_000_000,
        },
        {"artifact": "olive", "unavailable": "failed"},
        {
            "artifact": "ours",
            "task": "training",
            "batch_size": 8,
            "samples_per_second": 120.4,
            "measured_on": "y, 2026-11-21",
            "samples_per_second_ci95": [100, 130],
        },
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


@pytest.mark.parametrize(
    ("goal", "value", "unit", "shown"),
    [
        (0.0005, 0.0014, "fraction", ("0.05 %", "0.14 %")),
        (0.003, 0.0033, "fraction", ("0.30 %", "0.33 %")),
        (0.999, 0.9996, "ratio", ("0.999x", "1.000x")),
        (1.15, 1.27, "ratio", ("1.15x", "1.27x")),
        (0, 0, "count", ("0", "0")),
    ],
)
def test_a_goal_and_a_figure_that_misses_it_never_look_alike(goal, value, unit, shown):
    assert _figures(goal, value, unit) == shown


def test_claims_rows_and_their_origin_are_on_the_page():
    text = page({"peers": RESULT, "other_thing": {**RESULT, "rows": []}})
    assert "## Peers" in text and "## Other thing" in text
    assert "| faster | at least 2.50x | 2.00x | falls short |" in text
    assert "| steps | at most 9 steps | 7 steps |  |" in text
    assert "| nncf | OpenVINO | – | 1.23 ms ±4 % | 0.500 ms | 4.00 MB | 50.0 % |" in text
    assert "| failed |" in text and "a batch of 8 pairs (measured on y, 2026-11-21):" in text
    assert "| ours | 120 | 100 to 130 |" in text
    assert "`benchmarks/results/peers.json`" in text


def test_zoo_says_where_each_file_ran_and_how_near_the_limits():
    about = {"model": "small", "target": "web", "precision": "q8", "host": "browser"}
    figures = {"p50_ms": 2.0, "p50_ms_ci95": [2.0, 2.0], "size_bytes": 500_000, "top1": None}
    figures |= {"processor_p50_ms": 1.5}
    roof = {"gflops": 12.34, "of_compute": 0.5, "of_bandwidth": 0.1, "limit": "compute"}
    rows = [
        {**about, "tower": tower, **figures, "roofline": roof, "accuracy_note": "not measured"}
        for tower in ("image", "text")
    ]
    missing = {"model": "large", "target": "onnxruntime", "precision": "fp32", "host": "local"}
    rows += [{**missing, "tower": t, "unavailable": "not run"} for t in ("image", "text")]
    peaks = {"fp32_gflops": 100.0, "bf16_gflops": 201.26, "int8_gflops": None, "memory_gbps": 9.5}
    rows += [{"task": "peaks", "model": "small", "threads": 1, **peaks}]
    text = "\n".join(results_tables.zoo(rows))
    web = "| small | Web | q8 | Chromium | 2.00 ms | 2.00 ms | 1.50 ms + 1.50 ms | 1.00 MB |"
    assert f"{web} not measured |" in text
    assert "| small | Web | q8 | image | 12.3 | 50.0 % | 10.0 % | compute |" in text
    assert "| large | ONNX Runtime | fp32 | this CPU | not run |" in text
    assert "| small | 100.0 | 201.3 | – | 9.5 |" in text


def test_fitted_line_goes_through_points_of_that_power():
    points = [
        {"curve": "batch", "size": s, "p50_ms": 3.0 * s**1.5, "p50_ms_ci95": [2.9 * s**1.5] * 2}
        for s in (1, 2, 4)
    ]
    fit = {"curve": "batch", "exponent": 1.5, "exponent_ci95": [1.4, 1.6]}
    drawn = scaling_plots.panel("batch", [*points, fit], 0)
    assert drawn is not None
    for end, point in zip(drawn["line"], (drawn["points"][0], drawn["points"][-1])):
        assert abs(end[0] - point["cx"]) < 0.1 and abs(end[1] - point["cy"]) < 0.1
    svg = scaling_plots.draw([*points, fit])
    assert len(re.findall("<circle", svg)) == 3 and "size^1.50" in svg
