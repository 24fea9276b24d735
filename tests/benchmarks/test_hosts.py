"""Hosts that aren't here, against conversations with them, and one that stands for a remote."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_clip

import export.onnx
from benchmarks import bundles, scopes
from benchmarks.hosts import android, cuda, ios, remote
from benchmarks.timing import Artifact
from compress.clip import TorchEncoder
from compress.errors import PocketclipError
from export import Unavailable

CONVERSATION = Path(__file__).with_name("adb_conversation.json")
"""Written after the documented output of adb, dumpsys and the benchmark binaries: no phone was at
hand. `test_adb.py` asks the same through the real adb."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "onnx"
    export.onnx.write(tiny_clip(layers=1), export.onnx.Config(), folder)
    return folder


def artifact(bundle, host):
    return Artifact("onnx", bundle, "image", 2, bundles.read(bundle).queries("image"), host=host)


class Phone:
    """Answers adb's questions from the conversation; what it does not know is a failed command."""

    def __init__(self, **changes):
        self.answers = json.loads(CONVERSATION.read_text()) | changes
        self.asked = []

    def __call__(self, place, *words, timeout=60):
        self.asked.append(" ".join(words))
        for question, answer in self.answers.items():
            if question in self.asked[-1]:
                return answer
        raise Unavailable(f"adb: unknown question {self.asked[-1]}")


@pytest.fixture
def phone(monkeypatch):
    made = Phone()
    monkeypatch.setattr(android, "adb", made)
    return made


def test_phone_is_described_with_its_thermal_state(phone):
    about = android.describe()
    assert (about["model"], about["android"]) == ("Pixel 8a", "15")
    assert (about["battery_percent"], about["battery_celsius"], about["plugged"]) == (
        87,
        29.1,
        True,
    )
    assert about["thermal_status"] == 0


def test_phone_runs_the_pushed_file_with_the_asked_threads_and_tells_each_query(phone, bundle):
    worker = android.Worker(artifact(bundle, "android"), [], 60)
    samples = worker.run(3, 1.0)
    assert samples[:, 0] == pytest.approx([4.12, 4.05, 4.31]) and np.isnan(samples[:, 1]).all()
    assert worker.opened == {"load_ms": pytest.approx(21.4), "first_ms": pytest.approx(4.12)}
    assert worker.peak_memory_bytes() == 41_500_000
    pushed = next(words for words in phone.asked if words.startswith("push"))
    assert str(bundle / "image.onnx") in pushed
    assert " -x 2 " in phone.asked[-1] and " -r 3 " in phone.asked[-1]
    worker.close()
    assert "rm -rf /data/local/tmp/pocketclip/" in phone.asked[-1]


def test_litert_tells_a_mean_in_microseconds_and_memory_in_mebibytes():
    said = "Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14462.3, "
    said += "Inference (avg): 14575.2\nMemory footprint delta from the start of the tool (MB): "
    said += "init=1.5 overall=2.5\n"
    assert android.samples_ms(said) == [pytest.approx(14.5752)]
    assert android.peak_bytes(said) == 2.5 * 2**20 and android.peak_bytes("") is None


def test_hot_phone_is_a_reason_and_not_a_figure(phone, bundle):
    worker = android.Worker(artifact(bundle, "android"), [], 60)
    phone.answers["dumpsys thermalservice"] = "Thermal Status: 4"
    with pytest.raises(Unavailable, match="too hot"):
        worker.run(3, 1.0)


def test_phone_without_the_binary_says_what_to_push(phone, bundle):
    phone.answers[f"ls {android.HOME}/onnxruntime_perf_test"] = ""
    with pytest.raises(Unavailable, match="onnxruntime_perf_test: build it"):
        android.Worker(artifact(bundle, "android"), [], 60)


def test_binary_that_tells_nothing_is_an_error(phone):
    with pytest.raises(PocketclipError, match="told no times"):
        android.samples_ms("Segmentation fault")


def test_machine_without_adb_is_a_reason(monkeypatch):
    monkeypatch.setattr(android.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="no adb"):
        android.describe()


def test_machine_without_a_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unavailable, match="no CUDA device"):
        cuda.describe()


def test_inputs_lie_where_the_weights_of_a_torch_model_are():
    encoder, pixels = TorchEncoder(tiny_clip(layers=1)), torch.zeros(1, 3, 8, 8)
    assert scopes.beside(encoder, [pixels])[0].device.type == "cpu"
    encoder.model.to("meta")
    tensor, sentence = scopes.beside(encoder, [pixels, "a cat"])
    assert tensor.device.type == "meta" and sentence == "a cat"
    assert scopes.beside(object(), [pixels]) == [pixels]


def coreml_bundle(folder):
    folder.mkdir()
    about = {"schema_version": 1, "target": "coreml", "precision": "fp16"}
    about |= {"model": {"embedding_space": "sha256:ab"}, "preprocess": {}, "license": "x"}
    about |= {"provenance": [], "tokenizer": {"file": "tokenizer.json"}, "files": {}}
    for tower in ("image", "text"):
        (folder / f"{tower}.mlpackage").mkdir()
        (folder / f"{tower}.mlpackage" / "Manifest.json").write_text("{}")
        about[tower] = {"file": f"{tower}.mlpackage/Manifest.json"}
        about["files"][f"{tower}.mlpackage/Manifest.json"] = "sha256:0"
    about["files"] |= {"tokenizer.json": "", "golden/golden.json": ""}
    (folder / "bundle.json").write_text(json.dumps(about))
    return folder


def test_iphone_gets_a_test_and_gives_its_samples_back(tmp_path):
    bundle = coreml_bundle(tmp_path / "coreml")
    about = Artifact("coreml", bundle, "image", 1, np.zeros((1, 3, 8, 8)), host="ios")
    with pytest.raises(Unavailable, match="coreml-xcode in Xcode"):
        ios.Worker(about, [], 60)
    swift = (tmp_path / "coreml-xcode" / "PocketClipLatency.swift").read_text()
    assert 'model: "image"' in swift and '"sha256": "sha256:ab"' in swift and "{{" not in swift
    assert (tmp_path / "coreml-xcode" / "text.mlpackage" / "Manifest.json").exists()
    row = {
        "tower": "image",
        "sha256": "sha256:ab",
        "load_ms": 80.0,
        "first_ms": 3.0,
        "ms": [1, 2, 3],
    }
    log = f"t = 0.1s noise\n{ios.MARK}{json.dumps(row)}\nTest Case passed\n"
    (bundle / ios.REPORT).write_text(log)
    worker = ios.Worker(about, [], 60)
    assert worker.run(4, 1.0)[:, 0].tolist() == [1, 2, 3, 1] and worker.opened["load_ms"] == 80.0
    with pytest.raises(PocketclipError, match="another model"):
        ios.import_report(bundle / ios.REPORT, "image", "sha256:cd")
    with pytest.raises(PocketclipError, match="no samples of the text tower"):
        ios.import_report(bundle / ios.REPORT, "text", "sha256:ab")


def test_remote_needs_a_name_and_says_what_ssh_said(monkeypatch):
    with pytest.raises(Unavailable, match="name the machine"):
        remote.ssh("", "true")
    monkeypatch.setattr(
        remote, "ssh", lambda place, command: ["sh", "-c", "echo denied >&2; exit 255"]
    )
    with pytest.raises(Unavailable, match="pi: denied"):
        remote.describe("pi")


def test_remote_worker_times_there_what_was_copied_there(bundle, tmp_path, monkeypatch):
    """A shell with another home stands for the other machine."""
    root = Path(remote.__file__).parents[2]

    def here(place, command):
        return ["sh", "-c", f"cd {tmp_path}; HOME={tmp_path} PYTHONPATH={root} exec {command}"]

    monkeypatch.setattr(remote, "PYTHON", sys.executable)

    def wrapped(place, command):
        return here(place, command if "python" in command else f"sh -c '{command}'")

    monkeypatch.setattr(remote, "ssh", wrapped)
    worker = remote.Worker(replace(artifact(bundle, "remote:pi"), threads=1), [], 300)
    samples = worker.run(4, 60.0)
    worker.close()
    assert samples.shape == (4, 2) and (samples[:, 0] > 0).all() and worker.opened["load_ms"] > 0
    copied = list(tmp_path.glob(f"{remote.CACHE}/*/image.onnx"))
    assert len(copied) == 1 and copied[0].read_bytes() == (bundle / "image.onnx").read_bytes()
    assert subprocess.run(["test", "-d", str(tmp_path / ".cache")]).returncode == 0


def test_cuda_graphs_are_asked_for_by_name_and_refused_off_the_gpu():
    assert cuda.parsed("") == (0, False) and cuda.parsed("1:graph") == (1, True)
    with pytest.raises(PocketclipError, match="there is cuda, cuda:INDEX and cuda:graph"):
        cuda.parsed("graphs")
    with pytest.raises(Unavailable, match="torch models alone"):
        cuda.captured(lambda x: x, torch.zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_query_gives_what_the_query_gives():
    weight, queries = torch.randn(8, 8, device="cuda"), torch.randn(3, 4, 8, device="cuda")
    replay = cuda.captured(lambda x: x @ weight, queries[0])
    for query in queries:
        torch.testing.assert_close(replay(query), query @ weight)
