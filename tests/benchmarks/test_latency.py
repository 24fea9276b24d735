"""The timing protocol with clocks we set, its statistics, and real processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import export.onnx
from benchmarks import bundles, scopes
from benchmarks.hosts import local
from benchmarks.hosts.local import Worker, pick_cores
from benchmarks.latency import measure
from benchmarks.statistics import resampled_medians, summarise
from benchmarks.timing import Artifact, Config, Timing
from compress.errors import PocketclipError
from export import Unavailable

QUICK = Config(
    processes=2,
    rounds=3,
    round_seconds=0.01,
    round_queries=10,
    min_queries=10,
    patience_seconds=0,
)


def artifact(name, tower="image"):
    return Artifact("onnx", Path(name), tower, 1, np.zeros((2, 3)))


class Pretend:
    """Stands for a worker process: every query takes the milliseconds its folder is named after."""

    log: ClassVar[list[tuple[str, str]]] = []
    refusals: ClassVar[dict[str, int]] = {}

    def __init__(self, about, cores, timeout_seconds):
        self.name, self.turns = about.folder.name, 0
        self.opened = {"load_ms": 5.0, "first_ms": 2.0}
        self.log.append(("open", self.name))
        if self.refusals.get(self.name) == 0:
            raise Unavailable("no such runtime")

    def run(self, queries, seconds):
        self.turns += 1
        if self.refusals.get(self.name) == self.turns:
            raise Unavailable("its process ended")
        self.log.append(("run", self.name))
        return np.full((queries, 2), [float(self.name), float(self.name) / 2])

    def peak_memory_bytes(self):
        return 1000

    def placement(self):
        return {"requested": "CPU", "operators": {"CPU": {"MatMul": 3}}}

    def close(self):
        self.log.append(("close", self.name))


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(local, "Worker", Pretend)
    monkeypatch.setattr(Pretend, "log", [])
    monkeypatch.setattr(Pretend, "refusals", {})
    return Pretend


def test_every_candidate_runs_once_in_each_round_in_changing_order(pretend):
    cfg = QUICK.model_copy(update={"rounds": 8, "warmup_seconds": 0.0})
    timings, _ = measure([artifact(str(n)) for n in (1, 2, 3)], cfg, progress=False)
    turns = [name for kind, name in pretend.log if kind == "run"]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    rounds = rounds[:16]  # then each one's peak memory is read
    assert all(set(r) == {"1", "2", "3"} for r in rounds)
    assert len(set(rounds)) > 2
    assert [len(timing.rounds) for timing in timings] == [16, 16, 16]


def test_a_log_is_told_what_is_timed_and_for_how_long(pretend, capfd):
    cfg = QUICK.model_copy(update={"round_seconds": 5.0, "max_seconds": 90.0})
    measure([artifact("1"), artifact("2")], cfg)
    said = capfd.readouterr().err
    assert "latency on local: 2 towers, 60 s of queries, at most 90 s on a busy machine" in said
    measure([artifact("1")], QUICK, progress=False)
    assert not capfd.readouterr().err


def test_each_session_opens_fresh_processes_and_closes_them(pretend):
    measure([artifact("1"), artifact("2")], QUICK, progress=False)
    kinds = [kind for kind, _ in pretend.log if kind != "run"]
    sessions, aside = ["open", "open", "close", "close"] * 2, ["open", "close"] * 2
    assert kinds == sessions + aside


def test_rounds_go_on_until_every_candidate_has_enough_queries(pretend):
    cfg = QUICK.model_copy(update={"min_queries": 100})
    timings, _ = measure([artifact("1")], cfg, progress=False)
    assert timings[0].num_queries == 100 and len(timings[0].rounds) == 10
    assert summarise(timings[0], cfg)["enough_queries"]


def test_rounds_end_at_the_time_limit_and_the_row_says_so(pretend):
    cfg = QUICK.model_copy(update={"min_queries": 10_000_000, "max_seconds": 0.2})
    timings, _ = measure([artifact("1")], cfg, progress=False)
    assert not summarise(timings[0], cfg)["enough_queries"]


@pytest.mark.parametrize("turn, reason", [(0, "no such runtime"), (3, "its process ended")])
def test_candidate_that_cannot_run_is_a_reason_and_the_others_go_on(pretend, turn, reason):
    pretend.refusals["2"] = turn
    timings, _ = measure([artifact("1"), artifact("2")], QUICK, progress=False)
    assert summarise(timings[1], QUICK) == {"unavailable": reason}
    assert len(timings[0].rounds) == 6


def test_speedup_is_the_ratio_of_medians(pretend):
    timings, _ = measure([artifact("8"), artifact("2")], QUICK, progress=False)
    row = summarise(timings[1], QUICK, baseline=timings[0])
    assert (row["p50_ms"], row["speedup"], row["speedup_ci95"]) == (2.0, 4.0, [4.0, 4.0])
    assert (row["processor_p50_ms"], row["processor_speedup"]) == (1.0, 4.0)
    assert (row["load_ms"], row["first_ms"], row["peak_memory_bytes"]) == (5.0, 2.0, 1000)


def test_first_queries_of_a_turn_are_not_counted(pretend, monkeypatch):
    def run(self, queries, seconds):
        return np.array([[900.0, 9.0], [800.0, 8.0]] + [[1.0, 1.0]] * (queries - 2))

    monkeypatch.setattr(Pretend, "run", run)
    timings, _ = measure([artifact("1")], QUICK.model_copy(update={"discard": 2}), progress=False)
    assert max(samples.max() for samples in timings[0].rounds) == 1.0


def test_resampled_median_without_resampling_is_the_median():
    samples = np.random.default_rng(0).random(41)
    assert resampled_medians([samples], 100, seed=0) == pytest.approx(np.median(samples))


def test_resampled_medians_equal_sorting_the_drawn_rounds():
    random = np.random.default_rng(1)
    rounds = [random.random(2 * n + 3) for n in range(6)]
    counts = np.random.default_rng(5).multinomial(6, [1 / 6] * 6, size=50)
    for found, count in zip(resampled_medians(rounds, 50, seed=5), counts):
        drawn = np.sort(np.concatenate([np.tile(r, c) for r, c in zip(rounds, count)]))
        middle = drawn[(len(drawn) - 1) // 2 : len(drawn) // 2 + 1]
        assert middle[0] <= found <= middle[-1]


def test_interval_of_the_ratio_is_not_widened_by_disturbances_that_hit_both():
    random = np.random.default_rng(2)
    slow = random.uniform(1, 3, 24)  # how much the machine was slowed in each round
    baseline, own = (Timing(artifact("x"), [0]) for _ in range(2))
    baseline.processor_rounds = own.processor_rounds = [np.ones(20)] * 24
    baseline.rounds = [8 * s * random.normal(1, 0.01, 20) for s in slow]
    own.rounds = [2 * s * random.normal(1, 0.01, 20) for s in slow]
    for timing in (baseline, own):
        timing.opened, timing.warmups = [{"load_ms": 1, "first_ms": 1}], []
    row = summarise(own, Config(), baseline)
    low, high = row["speedup_ci95"]
    assert low <= 4 <= high and high - low < 0.2
    assert row["p50_ms_ci95"][1] / row["p50_ms_ci95"][0] > 1.2


def test_drift_is_last_quarter_over_first():
    timing = Timing(artifact("x"), [0])
    timing.rounds = [np.full(5, 1.0)] * 2 + [np.full(5, 1.2)] * 4 + [np.full(5, 1.5)] * 2
    timing.processor_rounds = timing.rounds
    timing.opened = [{"load_ms": 1, "first_ms": 1}]
    assert summarise(timing, Config())["drift"] == pytest.approx(1.5)


def test_more_threads_than_cores_are_refused():
    with pytest.raises(PocketclipError, match="threads"):
        pick_cores(10_000)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from tiny import tiny_clip

    folder = tmp_path_factory.mktemp("bundle") / "onnx"
    export.onnx.write(tiny_clip(), export.onnx.Config(), folder)
    return folder


@pytest.fixture
def worker(bundle):
    pixels = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)
    made = Worker(Artifact("onnx", bundle, "image", 1, pixels), pick_cores(1), 60)
    yield made
    made.close()


def test_worker_process_times_queries_of_a_real_bundle(worker):
    samples = worker.run(20, 10.0)
    assert samples.shape == (20, 2) and (samples[:, 0] > 0).all()
    # Pinned to one core, it cannot get more processor time than passed (both clocks tick in 1 us).
    assert (samples[:, 1] <= samples[:, 0] + 0.1).all()
    assert worker.opened["load_ms"] > 0 and worker.opened["first_ms"] > 0
    assert len(worker.run(1_000_000, 0.05)) < 1_000_000


def test_worker_is_pinned_to_its_core(worker):
    assert os.sched_getaffinity(worker._process.pid) == set(pick_cores(1))


def test_peak_memory_is_that_of_the_model_and_not_of_python(worker):
    worker.run(5, 1.0)
    # The tiny model needs a few MB; the imported libraries, which don't count, over 200.
    assert 0 < worker.peak_memory_bytes() < 60e6


def test_killed_worker_is_a_reason(worker):
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match=r"its process ended on 'run' \(exit code -9\)"):
        worker.run(5, 1.0)


def test_worker_that_cannot_open_its_bundle_says_why(tmp_path):
    with pytest.raises(PocketclipError, match="timing gone"):
        Worker(Artifact("nonesuch", tmp_path / "gone", "image", 1, np.zeros((1, 3))), [0], 60)


def test_runtime_that_is_not_there_is_a_reason(monkeypatch):
    class Tower:
        def __init__(self, about):
            raise Unavailable("macOS only")

    sent = []
    pipe = type("Pipe", (), {"send": lambda self, message: sent.append(message)})()
    monkeypatch.setattr(local.signal, "signal", lambda *_: None)
    local._serve(pipe, artifact("x"), sorted(os.sched_getaffinity(0)), Tower)
    assert sent == [("unavailable", "macOS only")]


def test_waiting_is_no_processor_time():
    tower = local.Tower.__new__(local.Tower)
    tower._inputs, tower._next, tower._place = [None], 0, lambda query: query
    tower._call = lambda query: time.sleep(0.02)
    (wall, processor), *_ = tower.run(3, 10.0)
    assert wall >= 20 and processor < 10


def test_a_runtime_s_own_clock_counts_where_it_has_one():
    tower = local.Tower.__new__(local.Tower)
    tower._inputs, tower._next, tower._place = [None], 0, lambda query: query
    tower._call = lambda query: time.sleep(0.01) or 0.125
    assert tower.run(2, 10.0)[:, 0].tolist() == [0.125, 0.125]
    tower._call = lambda query: time.sleep(0.01)
    assert (tower.run(2, 10.0)[:, 0] > 9).all()


def test_an_input_stays_for_some_queries_and_then_the_next_one_comes():
    tower, placed = local.Tower.__new__(local.Tower), []
    tower._inputs, tower._next, tower._stays = ["a", "b", "c"], 0, 3
    tower._place = lambda query: placed.append(query) or query
    asked = []
    tower._call = asked.append
    assert len(tower.run(7, 10.0)) == 7
    assert placed == ["a", "b", "c"] and asked == list("aaabbbc")
    tower._call, tower._stays = lambda query: time.sleep(0.02), 50
    assert len(tower.run(100, 0.05)) <= 4  # the time counts among the queries of one input too


def test_script_without_a_main_guard_is_not_run_again(bundle, tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(f"""
from pathlib import Path
from benchmarks import run
print("ran")
cfg = run.Config(processes=1, rounds=2, round_seconds=0.01, min_queries=2, warmup_seconds=0,
                 patience_seconds=0)
print(len(run.bench_bundles([Path({str(bundle)!r})], cfg)["timings"]))
""")
    environment = {**os.environ, "PYTHONPATH": str(Path(local.__file__).parents[2])}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ran", "2"]


class Unbound:
    """An encoder that cannot bind its tensors."""

    def __init__(self, encoder):
        self.encode_image, self.encode_text = encoder.encode_image, encoder.encode_text


def test_input_that_can_be_bound_is_filled_in_before_the_clock_starts(bundle):
    log = []

    class Encoder(Unbound):
        def bind(self, tower):
            fill = lambda rows: log.append(("fill", tower, tuple(rows.shape)))  # noqa: E731
            return SimpleNamespace(fill=fill, run=lambda: log.append("run"))

    about = Artifact("onnx", bundle, "image", 1, bundles.read(bundle).queries("image"))
    place, query, inputs = scopes.pipeline(about, Encoder(export.onnx.load(bundle, threads=1)))
    placed = place(inputs[0])
    assert log == [("fill", "image", (1, 3, 32, 32))]
    query(placed)
    assert log[1:] == ["run"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_scopes_do_more_and_more_and_give_the_model_s_embedding(bundle, tower):
    about = Artifact("onnx", bundle, tower, 1, bundles.read(bundle).queries(tower), index_size=50)
    encoder = export.onnx.load(bundle, threads=1)
    found = {}
    for scope in ("preprocess", "search"):
        _, query, inputs = scopes.pipeline(replace(about, scope=scope), encoder)
        found[scope] = query(inputs[0])
    place, query, inputs = scopes.pipeline(about, Unbound(encoder))
    found["model"] = query(place(inputs[0]))
    assert torch.allclose(found["model"], found["preprocess"], atol=1e-5)
    index = scopes._index(50, found["model"].shape[1])
    assert (
        found["search"].tolist()
        == (index @ found["model"][0]).argsort(descending=True)[:10].tolist()
    )


def test_rounds_go_on_until_the_interval_is_narrow_or_patience_ends(pretend, monkeypatch):
    noise = np.random.default_rng(0)
    monkeypatch.setattr(Pretend, "run", lambda self, q, s: noise.uniform(1, 3) * np.ones((q, 2)))
    impatient, _ = measure([artifact("1")], QUICK, progress=False)
    cfg = QUICK.model_copy(update={"patience_seconds": 20, "max_interval": 0.2})
    patient, _ = measure([artifact("1")], cfg, progress=False)
    assert len(impatient[0].rounds) == 6 < len(patient[0].rounds)
    low, high = summarise(patient[0], cfg)["p50_ms_ci95"]
    assert (high - low) / summarise(patient[0], cfg)["p50_ms"] < 0.25


def test_placement_and_peak_memory_come_from_a_process_that_is_not_timed(pretend):
    timings, hosts = measure([artifact("1")], QUICK, progress=False)
    assert timings[0].placement["operators"] == {"CPU": {"MatMul": 3}}
    assert timings[0].peaks == [1000]
    assert [name for kind, name in pretend.log if kind == "open"] == ["1"] * 3
    assert hosts["local"]["energy"]


def test_host_that_is_not_there_is_a_reason_for_all_its_rows(pretend, monkeypatch):
    def describe(place):
        raise Unavailable(f"no phone {place}")

    monkeypatch.setattr(local, "describe", describe)
    timings, hosts = measure([artifact("1"), artifact("2")], QUICK, progress=False)
    assert [timing.unavailable for timing in timings] == ["no phone "] * 2
    assert hosts == {"local": {"unavailable": "no phone "}}
