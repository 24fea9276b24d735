"""OpenVINO bundles: the torch model against the files, and the precision that is pinned."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_clip, tiny_data

from compress.clip import TorchEncoder
from export import Unavailable, _calibration, _parity, _saturation
from export import openvino as exporter
from export._verify import verify

pytest.importorskip("openvino")
pytestmark = pytest.mark.usefixtures("trace_once")


@pytest.fixture(scope="module")
def bundle(trace_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "openvino-fp32"
    exporter.write(tiny_clip(), exporter.Config(), folder)
    return folder


def test_neither_openvino_nor_nncf_reports_to_its_maker() -> None:
    code = """
import export
import nncf.telemetry.wrapper as theirs
import openvino.tools.ovc.telemetry_utils as ours
print(ours.tm.__name__, type(theirs.telemetry).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["openvino.tools.ovc.telemetry_stub MagicMock"], (
        done.stderr
    )


def test_both_towers_equal_torch(bundle: Path) -> None:
    clip = tiny_clip()
    pixels, tokens = _parity.probes(clip)
    wanted, found = TorchEncoder(clip), exporter.load(bundle, threads=1)
    for ours, theirs in (
        (found.encode_image(pixels), wanted.encode_image(pixels)),
        (found.encode_text(tokens), wanted.encode_text(tokens)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_precision_is_pinned_recorded_and_read_back(bundle: Path) -> None:
    about = json.loads((bundle / "bundle.json").read_text())
    assert about["runtime"]["inference_precision"] == "f32"
    compiled = exporter.load(bundle, threads=1).image
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_a_precision_that_this_cpu_lacks_is_unavailable(bundle: Path, tmp_path: Path) -> None:
    lacking = {"f16", "bf16"} - exporter._supported(exporter._openvino())
    if not lacking:
        pytest.skip("this CPU computes in every precision")
    about = json.loads((bundle / "bundle.json").read_text())
    other = shutil.copytree(bundle, tmp_path / "other")
    about["runtime"]["inference_precision"] = precision = min(lacking)
    (other / "bundle.json").write_text(json.dumps(about))
    with pytest.raises(Unavailable, match=f"the bundle is for {precision}"):
        exporter.load(other)


def test_files_are_listed_and_meet_their_goldens(bundle: Path) -> None:
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    assert {"image.xml", "image.bin", "text.xml", "text.bin"} <= set(files)
    assert not list(bundle.glob("*.onnx*"))
    assert min(verify(bundle).values()) > 0.9999


def test_readme_code_runs(bundle: Path) -> None:
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("%") == 3


def test_a_device_that_is_not_here_is_unavailable(bundle: Path) -> None:
    with pytest.raises(Unavailable, match="tpu"):
        exporter.load(bundle, device="tpu")


def test_int8_calibrates_on_training_pairs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    clip = replace(tiny_clip(), data=tiny_data(tmp_path / "data"))
    monkeypatch.setattr(_saturation, "machine_flags", lambda: {"avx_vnni"})
    # A CPU without VNNI may not let it pass.
    settings = exporter.Config(precision="int8", calibration=6, min_cosine=-1)
    exporter.write(clip, settings, tmp_path / "out")
    runtime = json.loads((tmp_path / "out" / "bundle.json").read_text())["runtime"]
    assert runtime["calibration"]["source"] == "training pairs"
    assert runtime["calibration"]["num_images"] == 6
    graph = (tmp_path / "out" / "image.xml").read_text()
    assert graph.count('type="FakeQuantize"') > 10
    monkeypatch.setattr(_saturation, "machine_flags", lambda: {"avx2"})
    with pytest.warns(UserWarning, match="no VNNI.*quantize with weight_bits: 7"):
        exporter.load(tmp_path / "out")


def test_int8_written_without_vnni_cannot_overflow_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("nncf")
    clip = replace(tiny_clip(), data=tiny_data(tmp_path / "data"))
    levels = {}
    for flags in ({"avx2"}, {"avx_vnni"}):
        monkeypatch.setattr(_saturation, "machine_flags", lambda flags=flags: flags)
        settings = exporter.Config(precision="int8", calibration=6, min_cosine=-1)
        out = tmp_path / min(flags)
        exporter.write(clip, settings, out)
        runtime = json.loads((out / "bundle.json").read_text())["runtime"]
        levels[runtime["weight_bits"]] = largest_code(out / "image.xml")
    assert levels[7] <= 64 < levels[8]
    monkeypatch.setattr(_saturation, "machine_flags", lambda: {"avx2"})
    exporter.load(tmp_path / "avx2")
    assert not any("VNNI" in str(w.message) for w in recwarn)


def largest_code(path: Path) -> int:
    """Of all 8-bit constants in an OpenVINO file, but of the first layer."""
    import openvino

    model = openvino.Core().read_model(path)
    codes = [
        np.abs(node.data.astype(int)).max()
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().type_name == "i8"
    ]
    return int(sorted(codes)[-2])


def test_calibration_without_data_takes_drawings() -> None:
    clip = tiny_clip()
    samples = _calibration.collect(clip, 5)
    assert samples.source == "drawings" and samples.image.shape == (5, 3, 32, 32)
    assert [row.shape for row in samples.rows("text")[:2]] == [(1, 16), (1, 16)]
    again = _calibration.collect(clip, 5)
    assert all(np.array_equal(a, b) for a, b in zip(samples.rows("image"), again.rows("image")))
