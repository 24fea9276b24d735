"""What a report says of files that are slower than they should be."""

from typing import Any

import pytest

from benchmarks import story

NOTHING_ELSE: dict[str, Any] = {"timings": [], "disturbance": {}}


def artifact(precision: str, low: float, high: float, **about: str) -> dict[str, Any]:
    """Of a student in OpenVINO, its image tower timed between two milliseconds."""
    row = {"p50_ms": (low + high) / 2, "p50_ms_ci95": [low, high]}
    known = {"artifact": "student", "target": "openvino", "precision": precision} | about
    name = f"{known['artifact']} {precision}"
    return {**known, "name": name, "path": name, "towers": {"image": row, "text": {}}}


def test_integers_that_are_slower_than_float_are_a_warning():
    files = [artifact("fp32", 2.3, 2.4), artifact("int8", 3.6, 3.7)]
    [said] = story.warnings(NOTHING_ELSE, files)
    assert said == (
        "student int8, image tower: slower than the float32 file in OpenVINO (3.65 ms against "
        "2.35 ms); on this machine it saves space, not time."
    )


def test_the_fastest_float_file_of_any_runtime_counts():
    files = [
        artifact("fp32", 3.0, 3.1),
        artifact("fp32", 2.0, 2.1, target="onnxruntime"),
        artifact("int8", 2.5, 2.6),
    ]
    [said] = story.warnings(NOTHING_ELSE, files)
    assert "ONNX Runtime" in said


@pytest.mark.parametrize(
    "other",
    [
        artifact("int8", 1.0, 1.1),
        artifact("int8", 2.35, 2.6),
        artifact("int8", 3.6, 3.7, artifact="teacher"),
        artifact("fp32", 3.6, 3.7, target="litert"),
    ],
    ids=["faster", "within the interval", "of another model", "float too"],
)
def test_no_warning_where_a_file_is_not_surely_slower(other):
    assert story.warnings(NOTHING_ELSE, [artifact("fp32", 2.3, 2.4), other]) == []
