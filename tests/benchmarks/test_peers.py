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
from benchmarks.peers import _process, _training, environment, olive_clip, task


@pytest.mark.parametrize("name", environment.names())
def test_peer_says_what_it_needs_and_what_it_writes(name):
    peer = importlib.import_module(f"benchmarks.peers.{name}")
    assert isinstance(peer.REQUIRES, tuple) and peer.__doc__ and peer.PRECISION
    assert hasattr(bundles.opener(peer.FORMAT), "load")
    assert 3 <= task.num_lines(peer.compress) <= 80


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


def test_every_peer_is_compared_at_equal_or_better_accuracy_and_the_worst_ratio_leads():
    def row(artifact, ours, p50, top1):
        return {"artifact": artifact, "ours": ours, "tower": "image", "p50_ms": p50, "top1": top1}

    rows = [
        row("teacher", False, 9.0, 0.515),
        row("a", False, 4.0, 0.50),
        row("b", False, 6.0, 0.51),
        row("ours: small", True, 1.0, 0.45),
        row("ours: good", True, 2.0, 0.51),
        {"artifact": "c", "ours": False, "unavailable": "failed"},
        row("broken", False, 0.5, 0.2),
    ]
    worst, a, b, broken = experiment.claims(rows)
    assert (a["value"], a["rows"]) == (2.0, [1, 4]) and not a["holds"]
    assert (b["value"], b["rows"]) == (3.0, [2, 4]) and b["holds"]
    assert (broken["value"], broken["rows"]) == (0.5, [6, 3])
    assert worst["value"] == 0.5 and worst["rows"] == [6, 3]
    rows[4]["top1"] = 0.505
    worst, _, b, _ = experiment.claims(rows)
    assert (b["value"], b["rows"], b["holds"]) == (0.0, [2], False) and worst["value"] == 0.0
    assert experiment.claims(rows[:1]) == []


def test_olive_s_graphs_get_the_peers_input_and_unit_length(tmp_path):
    """A graph of two inputs stands for Olive's text tower; its mask becomes a constant."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    given = [
        helper.make_tensor_value_info(n, TensorProto.INT32, [1, 3]) for n in ("input_ids", "m")
    ]
    found = helper.make_tensor_value_info("embeds", TensorProto.FLOAT, [1, 3])
    nodes = [helper.make_node("Add", ["input_ids", "m"], ["sum"])]
    nodes.append(helper.make_node("Cast", ["sum"], ["embeds"], to=TensorProto.FLOAT))
    for tower, name in olive_clip.INPUTS.items():
        inputs = given if tower == "text" else given[1:]
        used = nodes if tower == "text" else [helper.make_node("Cast", ["m"], ["embeds"], to=1)]
        graph = helper.make_graph(used, tower, inputs, [found])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        if tower == "image":
            model.graph.input[0].name = model.graph.node[0].input[0] = name
        (tmp_path / tower).mkdir()
        onnx.save(model, tmp_path / tower / "model.onnx")
    (tmp_path / "cache").mkdir()
    olive_clip.towers(tmp_path, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "text.onnx")
    graph = onnx.load(tmp_path / "text.onnx").graph
    assert [value.name for value in graph.input] == ["input_ids"]
    [row] = session.run(None, {"input_ids": np.array([[1, 0, 0]], np.int32)})
    np.testing.assert_allclose(row, np.array([[2, 1, 1]]) / np.sqrt(6), rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.onnx", "text.onnx"]


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
