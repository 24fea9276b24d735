"""The android host through the real adb, client and server; only the phone is a stand-in."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from adb_phone import Phone
from tiny import tiny_clip

import export.onnx
from benchmarks import bundles
from benchmarks.hosts import android
from benchmarks.timing import Artifact
from export import Unavailable

pytestmark = pytest.mark.skipif(shutil.which("adb") is None, reason="no adb on this machine")

GETPROP = """#!/bin/sh
case $1 in
  ro.product.model) echo "Pixel 8a";;
  ro.soc.model) echo "Tensor G3";;
  ro.build.version.release) echo 15;;
  ro.product.cpu.abi) echo arm64-v8a;;
esac
"""
DUMPSYS = """#!/bin/sh
case $1 in
  battery) printf 'Current Battery Service state:\\n  AC powered: false\\n  USB powered: true\\n'
    printf '  level: 87\\n  scale: 100\\n  temperature: 291\\n';;
  thermalservice) printf 'IsStatusOverride: false\\nThermal Status: 0\\nCached temperatures:\\n';;
esac
"""
PERF_TEST = """#!{python}
# Runs the file, and prints as onnxruntime_perf_test does with -v.
import sys, time
import numpy, onnxruntime
words = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(words[words.index("-x") + 1])
start = time.perf_counter()
session = onnxruntime.InferenceSession(words[-1], options)
created = time.perf_counter() - start
given = session.get_inputs()[0]
feed = {{given.name: numpy.zeros(given.shape, "float32")}}
session.run(None, feed)
for n in range(int(words[words.index("-r") + 1])):
    start = time.perf_counter()
    session.run(None, feed)
    print(f"iteration:{{n + 1}},time_cost:{{time.perf_counter() - start}}")
print(f"Session creation time cost: {{created}} s")
print("Peak working set size: 41500000 bytes")
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adb") / "onnx"
    export.onnx.write(tiny_clip(layers=1), export.onnx.Config(), folder)
    return folder


@pytest.fixture(scope="module")
def server():
    """An adb server of our own, so that phones at this machine's usual one are left alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        yield
        subprocess.run(["adb", "kill-server"], capture_output=True, env=dict(os.environ))


@pytest.fixture
def phone(server, tmp_path):
    made = Phone(tmp_path / "phone")
    made.program("getprop", GETPROP)
    made.program("dumpsys", DUMPSYS)
    made.start()
    android.adb("", "connect", made.address)
    yield made
    android.adb("", "disconnect", made.address)
    made.close()


def artifact(bundle, phone):
    queries, host = bundles.read(bundle).queries("image"), f"android:{phone.address}"
    return Artifact("onnx", bundle, "image", 1, queries, host=host)


def test_adb_without_a_phone_is_a_reason(server):
    with pytest.raises(Unavailable, match="no devices/emulators found"):
        android.describe()
    with pytest.raises(Unavailable, match="device 'emulator-5554' not found"):
        android.describe("emulator-5554")


def test_phone_is_described_over_adb(phone):
    about = android.describe(phone.address)
    assert (about["model"], about["soc"], about["android"]) == ("Pixel 8a", "Tensor G3", "15")
    assert (about["battery_percent"], about["plugged"]) == (87, True)
    assert about["thermal_status"] == 0


def test_bundle_is_pushed_timed_and_removed_over_adb(phone, bundle):
    with pytest.raises(Unavailable, match="build it for arm64 and push it"):
        android.Worker(artifact(bundle, phone), [], 60)
    tool = phone.home / "pocketclip" / "onnxruntime_perf_test"
    tool.parent.mkdir()
    tool.write_text(PERF_TEST.format(python=sys.executable))
    tool.chmod(0o755)
    worker = android.Worker(artifact(bundle, phone), [], 60)
    [pushed] = phone.home.glob("pocketclip/*-image/image.onnx")
    assert pushed.read_bytes() == (bundle / "image.onnx").read_bytes()
    samples = worker.run(5, 10.0)
    assert samples.shape == (5, 2) and (samples[:, 0] > 0).all() and np.isnan(samples[:, 1]).all()
    assert worker.opened["load_ms"] > 0 and worker.peak_memory_bytes() == 41_500_000
    worker.close()
    assert not Path(pushed).exists()
    assert [words for words, _ in phone.said if words == "push"] == ["push"]


def test_command_that_fails_on_the_phone_is_a_reason(phone):
    with pytest.raises(Unavailable, match="no such file"):
        android.adb(phone.address, "shell", "echo no such file; exit 3")
