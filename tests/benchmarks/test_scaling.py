"""The exponent of curves whose law we set."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.experiments.scaling import claims, exponent
from benchmarks.timing import Artifact, Config, Timing


def timing(milliseconds, noise):
    made = Timing(Artifact("onnx", Path("x"), "image", 1, np.zeros(1)), [0])
    made.rounds = [milliseconds * noise.normal(1, 0.02, 20) for _ in range(12)]
    return made


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponent_of_a_power_law_is_found_within_its_interval(power):
    noise, sizes = np.random.default_rng(0), [32, 64, 128, 256]
    found = exponent(sizes, [timing(0.1 * size**power, noise) for size in sizes], Config())
    low, high = found["exponent_ci95"]
    assert found["exponent"] == pytest.approx(power, abs=0.02)
    assert low - 0.01 <= power <= high + 0.01 and high - low < 0.1


def test_one_point_has_no_exponent():
    assert exponent([1], [timing(1, np.random.default_rng(0))], Config())["exponent"] is None


def test_claims_follow_from_the_exponents():
    rows = [{"curve": "image_size", "size": 32}, {"curve": "image_size", "exponent": 2.5}]
    [claim] = claims(rows)
    assert claim["holds"] and claim["rows"] == [1] and claim["value"] == 2.5
