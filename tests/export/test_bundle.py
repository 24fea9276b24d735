"""What all bundles share: those that cannot run here, packages of several files."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip
from torch import nn

from benchmarks import bundles
from compress.clip import Encoder, TorchEncoder
from compress.errors import GateFailed
from export import Unavailable, _bundle

MAC = "predicts on macOS only"


def elsewhere(folder: Path, device: str = "cpu", threads: int | None = None) -> Encoder:
    raise Unavailable(MAC)


def spec(seed: int | None = 0, min_cosine: float = 0.9999) -> _bundle.Spec:
    """A target that never runs, simulated by a model of that seed."""
    simulate = None if seed is None else lambda folder: TorchEncoder(tiny_clip(seed))
    arguments = ("far", "fp16", "package", 1, min_cosine, elsewhere, "def open_tower(tower): ...")
    return _bundle.Spec(*arguments, simulate=simulate)


def write(spec: _bundle.Spec, out: Path) -> None:
    with _bundle.writing(tiny_clip(), out, spec) as folder:
        for tower in _bundle.TOWERS:
            (folder / f"{tower}.package").mkdir()
            (folder / f"{tower}.package" / "weights").write_text(tower)
            (folder / f"{tower}.package" / "graph").write_text(tower)


def test_a_bundle_that_cannot_run_here_says_so_and_why(tmp_path: Path) -> None:
    write(spec(), tmp_path / "out")
    described = json.loads((tmp_path / "out" / "bundle.json").read_text())
    assert described["executed"] is False
    assert described["unavailable"] == MAC
    assert described["parity"]["image"]["worst_cosine"] > 0.9999
    assert f"({MAC})" in (tmp_path / "out" / "README.md").read_text()


def test_a_simulation_that_misses_the_gate_is_reported(tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"far fp16, image tower, .*: worst cosine"):
        write(spec(seed=1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_a_simulation_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=MAC):
        write(spec(seed=None), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_package_has_the_hash_of_all_its_files(tmp_path: Path) -> None:
    write(spec(), tmp_path / "out")
    bundle = bundles.read(tmp_path / "out")
    assert bundle.sha256("image") != bundle.sha256("text")
    assert bundle.size_bytes("image") == 2 * len("image")
    files = {"a/x": "1", "a/y": "2", "b": "3"}
    assert _bundle.digest(files, "a") != _bundle.digest(files | {"a/y": "4"}, "a")
    assert _bundle.digest(files, "a") == _bundle.digest(files | {"b": "4"}, "a")
    assert (_bundle.digest(files, "b"), _bundle.digest(files, "c")) == ("3", None)


def test_a_copy_in_float_shares_weights_and_leaves_the_model_as_it_was() -> None:
    model = tiny_clip().model
    copied = _bundle.in_float(model)
    assert copied.image.patch.weight is model.image.patch.weight
    copied.image.patch = nn.Identity()
    assert isinstance(model.image.patch, nn.Conv2d)
    half = tiny_clip().model.half()
    again = _bundle.in_float(half)
    assert again.image.position.dtype == torch.float32 != half.image.position.dtype
