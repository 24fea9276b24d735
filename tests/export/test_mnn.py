"""MNN bundles against the torch model, in each precision."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress.clip import Clip, TorchEncoder, build
from compress.errors import GateFailed
from compress.schedule import Reduction, Site
from export import Unavailable, _parity
from export import mnn as exporter
from export import onnx as portable
from export._verify import verify

pytest.importorskip("MNN")
pytestmark = pytest.mark.usefixtures("trace_once")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "mnn"
    exporter.write(tiny_clip(), exporter.Config(), folder)
    return folder


def test_bundle_meets_its_goldens_and_names_its_runtime(bundle: Path) -> None:
    assert min(verify(bundle).values()) > 0.9999
    described = json.loads((bundle / "bundle.json").read_text())
    assert described["executed"] is True
    assert described["image"]["file"] == "image.mnn"
    assert "mnn" in described["runtime"]["proved_with"]
    assert not list(bundle.glob("*.onnx*"))


def test_both_towers_equal_torch(bundle: Path, clip: Clip) -> None:
    """To 2e-4 a number: its exponentials are approximations."""
    pixels, tokens = (rows[:12] for rows in _parity.probes(clip))
    wanted, found = TorchEncoder(clip), exporter.load(bundle, threads=1)
    torch.testing.assert_close(
        found.encode_image(pixels), wanted.encode_image(pixels), rtol=0, atol=2e-4
    )
    torch.testing.assert_close(
        found.encode_text(tokens), wanted.encode_text(tokens), rtol=0, atol=2e-4
    )


def test_rows_that_token_reduction_compares_keep_their_own_lengths(tmp_path: Path) -> None:
    clip = tiny_clip(layers=3)
    sites = (Site(layer=0, keep=8), Site(layer=1, keep=4))
    schedule = Reduction(method="guarded", sites=sites, guard=2, proportional=True)
    vision = clip.model.config.vision.model_copy(update={"reduction": schedule})
    config = clip.model.config.model_copy(update={"vision": vision})
    reduced = replace(clip, model=build(config, clip.model.state_dict(), "test"))
    exporter.write(reduced, exporter.Config(), tmp_path / "out")  # the gate is 0.9999
    pixels = _parity.probes(reduced)[0][:12]
    found = exporter.load(tmp_path / "out", threads=1).encode_image(pixels)
    wanted = TorchEncoder(reduced).encode_image(pixels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("precision", "least"), [("w8", 0.999), ("w4", 0.8)])
def test_fewer_bits_make_smaller_files_of_the_same_model(
    bundle: Path, clip: Clip, tmp_path: Path, precision: str, least: float
) -> None:
    """`least` is low for 4 bits, as one of four scales a column covers all of a tiny width."""
    for tower in ("image", "text"):
        portable.save(portable.graph(clip, tower, 1, 20), tmp_path / f"{tower}.onnx")
        options = exporter.QUANTIZATION[precision]
        exporter.convert(tmp_path / f"{tower}.onnx", tmp_path / f"{tower}.mnn", options)
        small, whole = (folder / f"{tower}.mnn" for folder in (tmp_path, bundle))
        assert small.stat().st_size < 0.7 * whole.stat().st_size
    pixels, tokens = (rows[:12] for rows in _parity.probes(clip))
    wanted, found = TorchEncoder(clip), exporter.load(tmp_path, threads=1)
    image = _parity.agreement(wanted.encode_image(pixels), found.encode_image(pixels), 1.0)
    text = _parity.agreement(wanted.encode_text(tokens), found.encode_text(tokens), 1.0)
    assert least < min(image["worst_cosine"], text["worst_cosine"]) < 0.99999


def test_four_bits_that_miss_the_gate_are_reported(tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"mnn w4, .* tower, .*: worst cosine"):
        exporter.write(
            tiny_clip(), exporter.Config(precision="w4", min_cosine=0.999), tmp_path / "out"
        )
    assert list(tmp_path.iterdir()) == []


def test_readme_code_runs(bundle: Path) -> None:
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("%") == 3


def test_what_the_converter_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.onnx").write_bytes(b"no graph")
    with pytest.raises(Unavailable, match="MNN cannot convert the image tower"):
        exporter.convert(tmp_path / "image.onnx", tmp_path / "image.mnn", [])


def test_another_device_is_unavailable(bundle: Path) -> None:
    with pytest.raises(Unavailable, match="not on cuda"):
        exporter.load(bundle, device="cuda")
