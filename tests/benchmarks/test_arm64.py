"""Numerics under emulation: what is claimed of them, and the reason where there are none."""

import numpy as np
import pytest

from benchmarks.experiments import arm64
from export import Unavailable


def test_worst_cosine_is_of_the_worst_row_whatever_its_length():
    a = np.array([[1.0, 0.0], [0.0, 2.0]])
    b = np.array([[5.0, 0.0], [3.0, 3.0]])
    assert arm64._worst(a, b) == pytest.approx(np.sqrt(0.5))


def test_claims_hold_above_the_gate_of_the_goldens():
    row = {"bundle": "b", "tower": "image", "worst_cosine_arm64": 0.9990, "min_cosine": 0.9995}
    rows = [{"bundle": "other", "unavailable": "no apt-get"}, row]
    [claim] = arm64.claims(rows)
    assert not claim["holds"] and claim["rows"] == [1]
    rows[1] = {**row, "worst_cosine_arm64": 0.9996}
    assert arm64.claims(rows)[0]["holds"]


def test_a_system_without_apt_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(arm64.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="no apt-get here"):
        arm64.emulator(tmp_path)


def test_what_a_fetch_says_is_passed_on(tmp_path):
    with pytest.raises(Unavailable, match=r"ls failed: .*missing"):
        arm64._command(["ls", str(tmp_path / "missing")], tmp_path)
