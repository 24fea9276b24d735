"""Comparison of two runs whose figures are set by hand."""

import copy
import json

import pytest
from typer.testing import CliRunner

from benchmarks import compare
from compress import cli
from compress.errors import GateFailed, PocketclipError

ROW = {
    "artifact": "student",
    "target": "onnxruntime",
    "precision": "int8",
    "tower": "image",
    "threads": 1,
    "p50_ms": 2.0,
    "p50_ms_ci95": [1.98, 2.02],
    "p90_ms": 2.4,
    "size_bytes": 1_000_000,
    "top1": 0.5,
    "top1_ci95": [0.47, 0.53],
}
BEFORE = {"rows": [ROW, {**ROW, "tower": "text"}], "machine": {"cpu": "a"}, "versions": {"x": "1"}}


def changed(**figures):
    after = copy.deepcopy(BEFORE)
    after["rows"][0] |= figures
    return after


def refused(after, *texts):
    conditions = [compare.parse(text, ROW) for text in texts]
    return compare.failures(compare.lines(BEFORE, after, conditions), conditions)


@pytest.mark.parametrize(
    "figures, condition, fails",
    [
        ({"p50_ms": 2.11}, "p50>+5%", True),
        ({"p50_ms": 2.09}, "p50>+5%", False),
        ({"p50_ms": 1.0}, "p50>+5%", False),
        ({"p50_ms": 2.4}, "p50>+0.3ms", True),
        ({"p50_ms": 1.9}, "p50<-4%", True),
        ({"top1": 0.496}, "top1<-0.3", True),
        ({"top1": 0.498}, "top1<-0.3", False),
        ({"top1": 0.496}, "top1<-0.3pt", True),
        ({"top1": 0.496}, "top1<-0.3%", True),
        ({"top1": 0.39}, "top1<40%", True),
        ({"top1": 0.39}, "top1<0.4", True),
        ({"top1": 0.41}, "top1<0.4", False),
        ({"size_bytes": 1_030_000}, "size>+20kB", True),
        ({"size_bytes": 1_010_000}, "size > +20 kB".replace(" kB", "kB"), False),
        ({"p90_ms": 13.0}, "p90>12ms", True),
        ({}, "p90>12", False),
    ],
)
def test_condition_holds_or_not(figures, condition, fails):
    assert bool(refused(changed(**figures), condition)) == fails


def test_failure_names_row_change_and_condition():
    [said] = refused(changed(p50_ms=2.2, p50_ms_ci95=[2.18, 2.22]), "p50>+5%")
    assert said == "student onnxruntime int8 image: p50_ms +10.0 % (p50>+5%)"


def test_change_within_the_noise_is_said_to_be_uncertain():
    [said] = refused(changed(p50_ms=2.2, p50_ms_ci95=[1.8, 2.6]), "p50>+5%")
    assert "not certain: 95 % interval" in said


def test_interval_of_a_ratio_adds_the_errors_of_both_runs():
    low, high = compare._interval(
        "p50_ms", ROW, {**ROW, "p50_ms": 4.0, "p50_ms_ci95": [3.96, 4.04]}
    )
    assert low == pytest.approx(1 - 2**1.5 * 0.01, abs=2e-3)
    assert high == pytest.approx(1 + 2**1.5 * 0.01, abs=2e-3)


def test_figure_that_is_no_longer_measured_is_a_failure():
    assert refused(changed(p50_ms=None), "p50>+5%") == [
        "student onnxruntime int8 image: p50_ms is no longer measured"
    ]


def test_runs_without_common_rows_fail_rather_than_pass():
    after = {"rows": [{**ROW, "target": "openvino"}]}
    assert refused(after, "p50>+5%") == ["p50>+5%: no row of both runs has p50_ms"]


@pytest.mark.parametrize(
    "text, words", [("p50+5%", "FIGURE"), ("p5>1", "p50_ms"), ("p50>+5kg", "unit")]
)
def test_condition_that_means_nothing_is_refused(text, words):
    with pytest.raises(PocketclipError, match=words):
        compare.parse(text, ROW)


@pytest.fixture
def runs(tmp_path):
    for name, content in (("a", BEFORE), ("b", changed(p50_ms=2.2, top1=0.49))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(content))
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_command_takes_conditions_after_one_option(runs):
    done = CliRunner().invoke(cli.app, ["compare", *runs, "--fail-if", "p50>+5%", "top1<-0.3"])
    assert isinstance(done.exception, GateFailed) and done.exception.exit_code == 1
    assert "p50_ms +10.0 %" in str(done.exception) and "top1 -0.01" in str(done.exception)


def test_command_without_a_held_condition_ends_well(runs):
    done = CliRunner().invoke(cli.app, ["compare", *runs, "--fail-if", "p50>+20%"])
    assert done.exit_code == 0 and "p50_ms" in done.output and "+10.0 %" in done.output


def test_command_needs_two_runs(runs):
    done = CliRunner().invoke(cli.app, ["compare", runs[0]])
    assert isinstance(done.exception, PocketclipError) and "two runs" in str(done.exception)


def test_other_machine_and_versions_are_noted():
    after = changed() | {"machine": {"cpu": "b"}, "versions": {"x": "2"}}
    assert compare.differences(BEFORE, after) == ["cpu: a -> b", "x: 1 -> 2"]
