"""The portable graph and its bundle, against the torch model and an independent reader."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from pydantic import ValidationError
from tiny import tiny_clip

from compress import atomic
from compress.clip import Clip, TorchEncoder
from compress.errors import GateFailed, PocketclipError
from compress.schedule import Method, Reduction, Site
from compress.stages.prune_tokens import reduced
from export import _bundle, _goldens, _parity, _proto, _reference
from export import onnx as exporter
from export._verify import verify

CHECKER = Path(__file__).parents[2] / "../shared/tools/check_bundle.py"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for all tests that only read it."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    exporter.write(tiny_clip(), exporter.Config(), folder)
    return folder


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def models(folder: Path) -> list[onnx.ModelProto]:
    return [onnx.load(folder / f"{tower}.onnx") for tower in _bundle.TOWERS]


def test_both_towers_equal_torch(bundle: Path, clip: Clip) -> None:
    pixels, tokens = _parity.probes(clip)
    wanted, found = TorchEncoder(clip), exporter.load(bundle, threads=1)
    torch.testing.assert_close(
        found.encode_image(pixels), wanted.encode_image(pixels), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        found.encode_text(tokens), wanted.encode_text(tokens), rtol=0, atol=1e-5
    )


def test_graphs_take_int32_tokens_and_static_batch(bundle: Path) -> None:
    image, text = (model.graph for model in models(bundle))
    shape = [d.dim_value for d in image.input[0].type.tensor_type.shape.dim]
    assert (image.input[0].name, shape) == ("pixels", [1, 3, 32, 32])
    assert text.input[0].name == "tokens"
    assert text.input[0].type.tensor_type.elem_type == TensorProto.INT32
    assert [image.output[0].name, text.output[0].name] == ["image_embedding", "text_embedding"]


def test_graphs_hold_no_infinity_no_dead_weights_and_no_paths(bundle: Path) -> None:
    for model in models(bundle):
        used = {name for node in model.graph.node for name in node.input}
        for tensor in model.graph.initializer:
            assert tensor.name in used
            values = numpy_helper.to_array(tensor)
            assert values.dtype.kind != "f" or np.isfinite(values).all()
        assert b".py" not in model.SerializeToString()


def test_a_model_with_an_infinite_mask_is_refused(tmp_path: Path) -> None:
    clip = tiny_clip()
    assert clip.model.text.mask is not None
    clip.model.text.mask[0, 1] = -torch.inf
    with pytest.raises(GateFailed, match="infinity"):
        exporter.write(clip, exporter.Config(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_batch_of_three_gives_the_same_rows_for_any_number_of_inputs(tmp_path: Path) -> None:
    clip = tiny_clip()
    exporter.write(clip, exporter.Config(batch=3), tmp_path / "out")
    encoder = exporter.load(tmp_path / "out", threads=1)
    tokens = clip.tokenizer(_goldens.TEXTS)
    assert len(tokens) % 3
    wanted = TorchEncoder(clip).encode_text(tokens)
    torch.testing.assert_close(encoder.encode_text(tokens), wanted, rtol=0, atol=1e-5)


def test_large_weights_go_beside_the_graph_and_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_proto, "EMBED_LIMIT_BYTES", 1000)
    exporter.write(tiny_clip(), exporter.Config(), tmp_path / "out")
    assert (tmp_path / "out" / "image.onnx").stat().st_size < 60_000
    files = json.loads((tmp_path / "out" / "bundle.json").read_text())["files"]
    assert {"image.onnx.data", "text.onnx.data"} <= set(files)
    verify(tmp_path / "out")


def test_verify_meets_the_goldens(bundle: Path) -> None:
    assert min(verify(bundle).values()) > 0.9999


def test_every_file_is_listed_with_its_hash(bundle: Path) -> None:
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    there = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert set(files) == there - {"bundle.json"}


@pytest.mark.parametrize("name", ["image.onnx", "tokenizer.json", "golden/wide.png"])
def test_a_changed_byte_is_detected(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(PocketclipError, match=f"{name} has changed"):
        verify(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "golden/../../outside"])
def test_paths_outside_the_bundle_are_refused(copy: Path, name: str) -> None:
    (copy.parent / "outside").write_text("x")
    description = json.loads((copy / "bundle.json").read_text())
    description["files"][name] = "sha256:" + "0" * 64
    (copy / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(PocketclipError, match="not a plain path"):
        verify(copy)


def test_a_bundle_that_lacks_a_part_is_refused(copy: Path) -> None:
    description = json.loads((copy / "bundle.json").read_text())
    for key in ("files", "image", "license"):
        damaged = {k: v for k, v in description.items() if k != key}
        (copy / "bundle.json").write_text(json.dumps(damaged))
        with pytest.raises(PocketclipError, match=f"lacks {key}"):
            verify(copy)


def test_a_tower_without_a_hash_is_refused(copy: Path) -> None:
    description = json.loads((copy / "bundle.json").read_text())
    del description["files"]["text.onnx"]
    (copy / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(PocketclipError, match=r"text\.onnx not listed"):
        verify(copy)


def test_a_linked_file_is_refused(copy: Path) -> None:
    (copy / "image.onnx").rename(copy.parent / "elsewhere.onnx")
    (copy / "image.onnx").symlink_to(copy.parent / "elsewhere.onnx")
    with pytest.raises(PocketclipError, match=r"image\.onnx is not a plain path"):
        verify(copy)


def test_an_embedding_below_the_promise_is_detected(copy: Path) -> None:
    path = copy / "golden" / "text-0.npy"
    np.save(path, -np.load(path))
    description = json.loads((copy / "bundle.json").read_text())
    description["files"]["golden/text-0.npy"] = f"sha256:{atomic.sha256(path)}"
    (copy / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(GateFailed, match="text tower meets its goldens"):
        verify(copy)


def test_readme_code_runs_without_torch_and_agrees(bundle: Path) -> None:
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += (
        "\nimport sys\nassert 'torch' not in sys.modules\n"
        "for entry in json.load(open('golden/golden.json'))['images']:\n"
        "    got = encode_image(read_pixels('golden/' + entry['file']))\n"
        "    assert got @ np.load('golden/' + entry['embedding']) > 0.999, entry\n"
        "for entry in json.load(open('golden/golden.json'))['texts']:\n"
        "    assert read_tokens(entry['text']).tolist() == entry['ids'], entry\n"
        "    wanted = np.load('golden/' + entry['embedding'])\n"
        "    assert encode_text(read_tokens(entry['text'])) @ wanted > 0.999, entry\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a red apple" in done.stdout and done.stdout.count("%") == 3


@pytest.mark.skipif(not CHECKER.exists(), reason="the independent reader is not in this checkout")
def test_an_independent_reader_accepts_the_bundle(bundle: Path) -> None:
    done = subprocess.run([sys.executable, CHECKER, bundle], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_failed_gate_leaves_the_old_bundle_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    impossible = exporter.Config.model_construct(batch=1, opset=20, min_cosine=1.01)
    with pytest.raises(GateFailed, match=r"worst cosine .* rank overlap@10"):
        exporter.write(tiny_clip(), impossible, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_a_killed_write_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path\n"
        "from tiny import tiny_clip; from export import onnx, _bundle\n"
        "_bundle.write_goldens = lambda *a: os.kill(os.getpid(), 9)\n"
        "onnx.write(tiny_clip(), onnx.Config(), Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, tmp_path / "out", root, root / "tests"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".partial-") for p in tmp_path.iterdir())


def test_embedding_space_follows_every_weight() -> None:
    one, same, other = tiny_clip(), tiny_clip(), tiny_clip()
    with torch.no_grad():
        other.model.text.position[3, 3] += 1e-3
    assert _reference.embedding_space(one) == _reference.embedding_space(same)
    assert _reference.embedding_space(one) != _reference.embedding_space(other)


def test_goldens_cover_the_awkward_pictures() -> None:
    pictures = _goldens.pictures((64, 64))
    assert {picture.mode for picture in pictures.values()} == {"RGB", "L", "LA", "RGBA", "I;16"}
    assert pictures["wide.png"].width > pictures["wide.png"].height
    assert pictures["tall.png"].width < pictures["tall.png"].height
    again = _goldens.pictures((64, 64))
    assert all(pictures[name].tobytes() == again[name].tobytes() for name in pictures)


def test_rank_overlap_counts_what_is_common() -> None:
    candidates = torch.eye(4)
    wanted, found = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[4.0, 1, 2, 3]])
    assert _parity.rank_overlap(wanted, found, candidates, k=2) == 0.5
    assert _parity.rank_overlap(wanted, wanted, candidates) == 1


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError):
        exporter.Config.model_validate({"bacth": 1})


def test_the_check_sees_a_broken_graph_without_its_weights() -> None:
    model = exporter.graph(tiny_clip(), "image", 1, 20)
    skeleton = _proto.skeleton(model)
    assert skeleton.ByteSize() < model.ByteSize() / 3
    onnx.checker.check_model(skeleton, full_check=True)
    multiply = next(node for node in model.graph.node if node.op_type == "MatMul")
    multiply.input[1] = multiply.input[0]
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(_proto.skeleton(model), full_check=True)


@pytest.mark.parametrize("method", get_args(Method))
def test_reduced_towers_take_any_number_of_pictures(method: str, tmp_path: Path) -> None:
    whole = tiny_clip(layers=3)
    guard = {"guard": 4} if method in ("guarded", "feather") else {}
    sites = (Site(layer=0, keep=12), Site(layer=1, keep=8))
    clip = reduced(whole, Reduction.model_validate({"method": method, "sites": sites, **guard}))
    path = tmp_path / "image.onnx"
    exporter.save(exporter.open_graph(clip, "image", 20), path)
    session = exporter._session(path, "cpu", 1)
    for num in (1, 3):
        pixels = torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(num))
        [found] = session.run(None, {"pixels": pixels.numpy()})
        wanted = TorchEncoder(clip).encode_image(pixels)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
