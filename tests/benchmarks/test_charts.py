"""Positions of plots against hand-computed ones."""

from itertools import pairwise

import pytest

from benchmarks.charts import Scale, bars, curve, frontier, log_ticks, scatter, ticks


def point(label, x, y):
    return {
        "label": label,
        "x": x,
        "x_ci": [0.9 * x, 1.1 * x],
        "y": y,
        "y_ci": [y - 0.02, y + 0.02],
    }


def test_scales_meet_their_ends_and_the_logarithmic_middle():
    linear, logarithmic = Scale(0, 10, 100, 0), Scale(1, 100, 0, 100, logarithmic=True)
    assert (linear(0), linear(10), linear(5)) == (100, 0, 50)
    assert (logarithmic(1), logarithmic(100), logarithmic(10)) == (0, 100, 50)


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.48, 0.63, [0.5, 0.55, 0.6]), (3, 3.9, None)],
)
def test_ticks_are_round_values_inside_the_range(low, high, expected):
    found = ticks(low, high)
    assert found == expected or expected is None
    assert 3 <= len(found) <= 9 and all(low <= value <= high for value in found)


def test_logarithmic_ticks():
    assert log_ticks(0.4, 11) == [0.5, 1, 2, 5, 10]


def test_frontier_leaves_out_what_is_slower_and_worse():
    points = [point("a", 1, 0.5), point("b", 2, 0.4), point("c", 3, 0.6), point("d", 3, 0.55)]
    assert [p["label"] for p in frontier(points)] == ["a", "c"]


def test_scatter_keeps_points_inside_and_labels_apart():
    points = [point(f"artifact number {n}", 1 + 0.01 * n, 0.5 + 0.001 * n) for n in range(5)]
    plot = scatter([*points, point("the teacher with a long name", 9, 0.6)])
    for p in plot["points"]:
        assert 64 <= p["cx"] <= plot["width"] and 0 <= p["cy"] <= plot["height"] - 52
        assert p["x_low"] < p["cx"] < p["x_high"] and p["y_high"] < p["cy"] < p["y_low"]
    heights = sorted(p["label_y"] for p in plot["points"][:5])
    assert all(b - a >= 17 for a, b in pairwise(heights))
    assert plot["points"][-1]["anchor"] == "end"


def test_labels_of_points_on_the_axis_stay_above_it():
    points = [{**point(f"artifact {n}", 1, 0.0), "y_ci": (0.0, 0.0)} for n in range(6)]
    plot = scatter(points)
    heights = sorted(p["label_y"] for p in plot["points"])
    assert heights[-1] <= plot["height"] - 52 and heights[0] >= 16
    assert all(b - a >= 17 for a, b in pairwise(heights))
    assert all(p["moved"] for p in plot["points"])
    assert plot["y_digits"] == 1  # 0, 0.5, 1 % and so on: whole percents would repeat
    assert scatter([point("a", 1, 0.3), point("b", 2, 0.7)])["y_digits"] == 0


def test_one_point_makes_a_plot():
    assert len(scatter([point("alone", 2, 0.5)])["points"]) == 1


def test_bars_start_at_zero_and_keep_proportions():
    groups = [
        {
            "label": "a · b",
            "parts": [{"name": "image", "value": 30}, {"name": "text", "value": 10}],
        },
        {"label": "c · d", "parts": [{"name": "image", "value": 20}]},
    ]
    rows = bars(groups, stacked=True)["rows"]
    image, text = rows[0]["parts"]
    assert image["width"] == pytest.approx(3 * text["width"], abs=0.05)
    assert text["x"] == pytest.approx(image["x"] + image["width"], abs=0.02)
    assert rows[0]["total"] == 40 and rows[1]["end"] < rows[0]["end"]
    first, second = bars(groups)["rows"][0]["parts"]
    assert first["x"] == second["x"] and second["y"] > first["y"]


def test_long_curve_is_thinned_but_keeps_its_ends():
    plot = curve(list(range(5000)), [1 / (n + 1) for n in range(5000)])
    assert len(plot["line"].split()) <= 320
    assert (plot["first"], plot["last"]) == (1, 1 / 5000)
