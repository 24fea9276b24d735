"""Files of weights that others wrote: mapped, checked before anything is allocated, never run."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config

from compress import clip
from compress.errors import PocketclipError
from compress.sources import _checkpoint


def test_state_dicts_are_found_where_trainers_put_them(tmp_path: Path) -> None:
    state = {"a": torch.randn(3), "b": torch.arange(2)}
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    for n, data in enumerate((state, {"state_dict": prefixed, "epoch": 3}, {"model": state})):
        torch.save(data, tmp_path / f"{n}.pt")
        found = _checkpoint.read(tmp_path / f"{n}.pt")
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    packed = zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    with pytest.raises(PocketclipError, match="its parts are compressed"):
        _checkpoint.read(tmp_path / "small.pt")


def test_shapes_are_compared_before_anything_is_allocated() -> None:
    state = {"image.position": torch.zeros(1, dtype=torch.half).expand(2**40, 2**10)}
    with pytest.raises(PocketclipError, match=r"image\.position has shape \(1099511627776, 1024\)"):
        clip.build(tiny_config(), state, "huge")


PEAK = "from benchmarks.experiments.model_arms import peak; import sys; peak(sys.argv[1])"


def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    """ViT-B/16 in float32, measured in a process of its own; the goal is 1.3 times its file."""
    import open_clip

    with torch.device("meta"):
        empty = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in empty.items()}
    path = tmp_path / "b16.safetensors"
    save_file(state, path)
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) / path.stat().st_size <= 1.3
