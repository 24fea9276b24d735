"""Folders as models: our own format, and what is none."""

from pathlib import Path

import pytest
import torch

from compress import clip
from compress.errors import PocketclipError
from compress.sources import folder, open_clip


def test_a_saved_model_opens_again_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = open_clip.load("ViT-S-32-alt/random")
    clip.save(first, tmp_path / "model")
    again = folder.load(tmp_path / "model")
    assert again.model.config == first.model.config
    assert again.preprocess == first.preprocess
    assert again.tokenizer.contract == first.tokenizer.contract
    assert (again.name, again.license, again.provenance) == (
        first.name,
        first.license,
        first.provenance,
    )
    weights = again.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    texts = ["", "a photo of a cat", "猫 😀", "word " * 100]
    assert torch.equal(again.tokenizer(texts), first.tokenizer(texts))


def test_what_is_no_model_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match="no such folder"):
        folder.load(tmp_path / "missing")
    with pytest.raises(PocketclipError, match=r"neither model\.json nor open_clip_config\.json"):
        folder.load(tmp_path)
