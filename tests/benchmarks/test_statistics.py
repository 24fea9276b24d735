"""Figures of samples that are easy to compute by hand."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import energy, machine, roofline, statistics
from benchmarks.timing import Artifact, Config, Timing


def timing(rounds, processes=None):
    made = Timing(Artifact("onnx", Path("x"), "image", 1, np.zeros(1)), [0])
    made.rounds = made.processor_rounds = [np.asarray(samples, float) for samples in rounds]
    made.process_of_round = processes or [0] * len(rounds)
    made.opened = [{"load_ms": 4, "first_ms": 2}]
    return made


@pytest.mark.parametrize(
    "count, percent, given", [(99, 90, False), (100, 90, True), (999, 99, False)]
)
def test_percentile_needs_ten_samples_beyond_it(count, percent, given):
    samples = np.arange(count, dtype=float)
    found = statistics.percentile(samples, percent)
    assert found == (np.percentile(samples, percent) if given else None)


def test_p99_is_given_with_a_thousand_samples():
    row = statistics.summarise(timing([np.arange(250)] * 4), Config())
    assert row["p99_ms"] == pytest.approx(np.percentile(np.tile(np.arange(250), 4), 99))


def test_throttling_is_a_slowdown_that_all_share():
    slower = timing([[1.0]] * 4 + [[1.3]] * 4)
    steady = timing([[1.0]] * 8)
    assert statistics.throttled([slower, slower]) is True
    assert statistics.throttled([slower, steady]) is False
    assert statistics.throttled([timing([[1.0]] * 3)]) is None


def test_process_spread_is_slowest_over_fastest_median():
    made = timing([[1.0, 1.0], [1.2, 1.2], [1.5, 1.5]], [0, 1, 2])
    assert statistics.summarise(made, Config())["process_spread"] == pytest.approx(1.5)


def test_processor_time_that_a_host_does_not_tell_is_none():
    made = timing([[1.0, 2.0]] * 4)
    made.processor_rounds = [np.full(2, np.nan)] * 4
    row = statistics.summarise(made, Config(), made)
    assert row["processor_p50_ms"] is None and row["processor_speedup"] is None
    assert row["speedup"] == 1.0


def test_energy_of_a_query_is_the_median_of_the_rounds():
    made = timing([[1.0]] * 3)
    made.joules = [0.001, 0.002, 0.009]
    assert statistics.summarise(made, Config())["energy_mj"] == pytest.approx(2.0)


def test_rapl_packages_are_added_and_parts_of_them_are_not(tmp_path):
    for zone, microjoules in (
        ("intel-rapl:0", 3e6),
        ("intel-rapl:1", 4e6),
        ("intel-rapl:0:0", 9e6),
    ):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{microjoules:.0f}\n")
    meter = energy.processor(tmp_path)
    assert meter.joules() == 7.0 and meter.method.startswith("RAPL, 2")


def test_without_a_counter_energy_is_not_measured(tmp_path):
    meter = energy.processor(tmp_path)
    assert meter.joules() is None and meter.method.startswith("not measured")
    assert energy.spent(5.0, 7.0) == 2.0
    assert energy.spent(5.0, 1.0) is None and energy.spent(None, 1.0) is None


def test_share_of_the_roofline_by_hand():
    peaks = [{"threads": 1, "fp32_gflops": 100.0, "int8_gflops": 400.0, "memory_gbps": 10.0}]
    row = {"num_macs": 5e6, "num_params": 200, "num_embedding_params": 50, "size_bytes": 4e6}
    timed = {"threads": 1, "scope": "model", "host": "local", "p50_ms": 1.0}
    fp32 = roofline.share({**row, "precision": "fp32"}, timed, peaks)
    assert fp32 == {"gflops": 10.0, "of_compute": 0.1, "of_bandwidth": 0.3, "limit": "bandwidth"}
    int8 = roofline.share({**row, "precision": "int8-dynamic"}, timed, peaks)
    assert int8["of_compute"] == 0.025
    assert roofline.share({**row, "precision": "fp32"}, {**timed, "threads": 2}, peaks) is None
    assert roofline.share({**row, "precision": "fp32"}, {**timed, "scope": "search"}, peaks) is None


def test_peaks_are_not_below_a_plain_product(monkeypatch):
    monkeypatch.setattr(roofline, "SIDES", (256,))
    monkeypatch.setattr(roofline, "TRIES_SECONDS", 0.02)
    monkeypatch.setattr(roofline, "COPIED_BYTES", 2**22)
    peaks = roofline.peaks(1)
    # The slowest core of the last ten years multiplies float32 matrices at more than 2 gigaflops.
    assert peaks["fp32_gflops"] > 2 and peaks["memory_gbps"] > 0.1 and peaks["threads"] == 1


def test_heat_is_json_whatever_the_system_tells():
    assert set(machine.heat()) == {"clock_mhz", "throttle_events", "celsius"}


def test_the_int8_peak_is_that_of_a_kernel_not_of_a_plain_loop() -> None:
    """Where torch has no instructions for it, its product is a hundred times slower."""
    found = roofline.peaks(1)
    assert found["int8_gflops"] > 0.5 * found["fp32_gflops"]
