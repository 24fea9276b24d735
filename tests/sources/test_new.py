"""New models from a description."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import clip
from compress.errors import PocketclipError
from compress.sources import new, open_clip


@pytest.fixture
def description(tmp_path: Path) -> dict[str, Any]:
    """A description made from a model.json, with its tokenizer beside it."""
    clip.save(open_clip.load("ViT-S-32-alt/random"), tmp_path / "model")
    described = json.loads((tmp_path / "model" / "model.json").read_text())
    described["tokenizer"]["file"] = "model/tokenizer.json"
    described["model"]["vision"].update(heads=[2, 1], mlp_width=[24, 48], head_width=16)
    return described


def written(folder: Path, description: dict[str, Any]) -> Path:
    path = folder / "small.json"
    path.write_text(json.dumps(description))
    return path


def test_a_description_becomes_a_model_that_saves(
    tmp_path: Path, description: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    made = new.load(written(tmp_path, description))
    assert made.model.config.vision.heads == (2, 1)
    assert (made.name, made.provenance) == ("small", ({"step": "new", "name": "small.json"},))
    clip.save(made, tmp_path / "saved")
    again = clip.load(tmp_path / "saved")
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(again.model.encode_image(pixels), made.model.encode_image(pixels))


def test_weights_follow_the_seed(tmp_path: Path, description: dict[str, Any]) -> None:
    path = written(tmp_path, description)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return new.load(path).model.text.token.weight

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_mistakes_are_named_together(tmp_path: Path, description: dict[str, Any]) -> None:
    del description["model"]["embed_dim"]
    description["preprocess"]["resize_mode"] = "stretch"
    with pytest.raises(PocketclipError, match=r"model\.embed_dim: .*preprocess\.resize_mode: "):
        new.load(written(tmp_path, description))


def test_parts_that_do_not_fit_are_named(tmp_path: Path, description: dict[str, Any]) -> None:
    description["preprocess"]["size"] = [64, 64]
    description["model"]["text"].update(context_length=20, vocab_size=1000)
    words = r"preprocess makes \(64, 64\).*makes 77 ids.*highest id is 49407"
    with pytest.raises(PocketclipError, match=words):
        new.load(written(tmp_path, description))


def test_missing_files_are_named(tmp_path: Path, description: dict[str, Any]) -> None:
    with pytest.raises(PocketclipError, match=r"missing\.json: no such file"):
        new.load(tmp_path / "missing.json")
    description["tokenizer"]["file"] = "elsewhere.json"
    with pytest.raises(PocketclipError, match=r"elsewhere\.json: no such file"):
        new.load(written(tmp_path, description))
