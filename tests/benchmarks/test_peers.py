"""Peers: what they are given, what they give back, and what is claimed of them."""

import importlib
import json

import numpy as np
import pytest
from tiny import tiny_clip, tiny_data

from benchmarks import bundles
from benchmarks.experiments import peers as experiment
from benchmarks.peers import environment, task


@pytest.mark.parametrize("name", environment.names())
def test_peer_says_what_it_needs_and_what_it_writes(name):
    peer = importlib.import_module(f"benchmarks.peers.{name}")
    assert isinstance(peer.REQUIRES, tuple) and peer.FORMAT in ("onnx", "openvino")
    assert peer.__doc__ and peer.PRECISION
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
        row("teacher", False, 9.0, 0.52),
        row("a", False, 4.0, 0.50),
        row("b", False, 6.0, 0.51),
        row("ours: small", True, 1.0, 0.45),
        row("ours: good", True, 2.0, 0.505),
        {"artifact": "c", "ours": False, "unavailable": "failed"},
    ]
    [claim] = experiment.claims(rows)
    assert claim["value"] == 2.0 and claim["rows"] == [1, 4] and not claim["holds"]
    rows[4]["top1"] = 0.49
    assert experiment.claims(rows) == []
