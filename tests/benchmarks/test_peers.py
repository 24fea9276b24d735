"""Peers: what they are given, what they give back, and what is claimed of them."""

import importlib
import json
import sys
import time

import numpy as np
import pytest
from tiny import tiny_clip, tiny_data

from benchmarks import bundles
from benchmarks.experiments import peers as experiment
from benchmarks.peers import _process, _training, environment, task


@pytest.mark.parametrize("name", environment.names())
def test_peer_says_what_it_needs_and_what_it_writes(name):
    peer = importlib.import_module(f"benchmarks.peers.{name}")
    assert isinstance(peer.REQUIRES, tuple) and peer.__doc__ and peer.PRECISION
    assert hasattr(bundles.opener(peer.FORMAT), "load")
    assert 3 <= task.num_lines(peer.compress) <= 40


def test_lines_of_a_user_are_code_without_docstring_and_blanks():
    def compress(a, b):
        """Not counted."""
        first = a + 1

        return first + b

    assert task.num_lines(compress) == 2


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    clip = tiny_clip(layers=1)
    task.prepare(clip, tiny_data(folder), folder / "task")
    return clip, folder


def test_calibration_is_of_training_pairs_after_the_contracts(given):
    clip, folder = given
    pixels, tokens = (
        np.load(folder / "task" / "calibration" / f"{t}.npy") for t in ("image", "text")
    )
    assert pixels.shape == (8, 3, 32, 32) and tokens.shape == (8, 16)
    assert (tokens[:, 0] == clip.tokenizer.contract.start_id).all()


def test_dynamic_peer_s_files_come_back_as_a_bundle_that_runs(given):
    import torch

    _, folder = given
    out = folder / "dynamic"
    task.run("ort_dynamic", folder / "task", out)
    bundle = bundles.read(task.as_bundle("ort_dynamic", folder / "task", out))
    assert (bundle.target, bundle.precision) == ("onnx", "int8-dynamic")
    assert json.loads((out / "result.json").read_text())["seconds"] > 0
    ours = bundles.read(folder / "task" / "onnx").encoder(threads=1)
    pixels = torch.from_numpy(bundle.queries("image"))
    found = bundle.encoder(threads=1).encode_image(pixels)
    assert (found * ours.encode_image(pixels)).sum(-1).min() > 0.9


def test_environment_that_is_not_made_says_how_to_make_it(tmp_path):
    with pytest.raises(Exception, match=r"benchmarks\.peers\.environment nncf"):
        environment.python("nncf", tmp_path)


def test_claim_compares_at_equal_or_better_accuracy():
    def row(artifact, ours, p50, top1):
        return {"artifact": artifact, "ours": ours, "tower": "image", "p50_ms": p50, "top1": top1}

    rows = [
        row("teacher", False, 9.0, 0.515),
        row("a", False, 4.0, 0.50),
        row("b", False, 6.0, 0.51),
        row("broken", False, 0.5, 0.2),
        row("ours: small", True, 1.0, 0.45),
        row("ours: good", True, 2.0, 0.505),
        {"artifact": "c", "ours": False, "unavailable": "failed"},
    ]
    [claim] = experiment.claims(rows)
    assert claim["value"] == 2.0 and claim["rows"] == [1, 5] and not claim["holds"]
    rows[5]["top1"] = 0.49
    assert experiment.claims(rows) == []


@pytest.mark.parametrize(
    ("script", "said", "written"),
    [
        ("open(r'{}', 'w').close()", None, True),
        ("open(r'{}', 'w').close(); import time; time.sleep(60)", "ended by us", True),
        ("import time; time.sleep(60)", "not done after", False),
        ("raise SystemExit('no such operator')", "failed: no such operator", False),
    ],
)
def test_a_peer_that_does_not_end_is_ended(tmp_path, monkeypatch, script, said, written):
    monkeypatch.setattr(_process, "GRACE_SECONDS", 0.3)
    result = tmp_path / "result.json"
    command = [sys.executable, "-S", "-c", script.format(result)]
    started = time.monotonic()
    found = _process.run(command, tmp_path, tmp_path / "log", result, 1.5)
    assert time.monotonic() - started < 10 and result.exists() == written
    assert found is None if said is None else said in found


def test_a_clock_counts_from_the_second_step(monkeypatch):
    times = iter([0.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr(_training.time, "perf_counter", lambda: next(times))
    clock = _training.Clock()
    for _ in range(3):
        clock.tick()
    assert clock.rate(8) == pytest.approx(8 * 2 / 4)  # steps 2 and 3 took from 10 to 14


def test_open_clip_trains_the_very_same_model():
    import torch

    clip = tiny_clip(layers=1)
    model, pixels = _training.as_open_clip(clip), torch.randn(2, 3, 32, 32)
    found = model.encode_image(pixels, normalize=True)
    expected = torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(found, expected)
