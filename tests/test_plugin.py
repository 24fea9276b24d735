"""A file in a plugin folder is found by its name, and by nothing else."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_clip, tiny_config

import compress.clip
from compress import plugin
from compress.errors import PocketclipError


def test_files_are_named_without_private_ones() -> None:
    assert plugin.names("toy.stages") == ["count", "nudge"]
    assert plugin.find("toy.stages", "nudge").VERSION == 1
    assert "_fit" not in plugin.names(plugin.SOURCES)


def test_unknown_name_comes_with_a_suggestion() -> None:
    with pytest.raises(PocketclipError, match=r"no 'nugde' in toy\.stages, did you mean 'nudge'\?"):
        plugin.find("toy.stages", "nugde")
    with pytest.raises(PocketclipError, match=r"\(there is: count, nudge\)"):
        plugin.find("toy.stages", "zzz")


def test_private_file_cannot_be_asked_for() -> None:
    with pytest.raises(PocketclipError, match="no '_fit'"):
        plugin.find(plugin.SOURCES, "_fit")


@pytest.mark.parametrize(
    ("model", "kind", "argument"),
    [
        ("open_clip:ViT-B-32/laion", "open_clip", "ViT-B-32/laion"),
        ("new:config.json", "new", "config.json"),
        ("some/folder", "folder", "some/folder"),
        ("C:/models/clip", "folder", "C:/models/clip"),
        ("hf-hub:timm/ViT-B-16-SigLIP", "open_clip", "hf-hub:timm/ViT-B-16-SigLIP"),
        ("local-dir:some/folder", "open_clip", "local-dir:some/folder"),
    ],
)
def test_source_is_the_word_before_the_colon(model: str, kind: str, argument: str) -> None:
    assert plugin.split_source(model) == (kind, argument)


def test_folder_is_relative_to_the_recipe(tmp_path: Path) -> None:
    clip = tiny_clip()
    compress.clip.save(clip, tmp_path / "model")
    opened = plugin.source("model", tmp_path)
    assert torch.equal(opened.model.image.position, clip.model.image.position)
    assert tiny_config() == opened.model.config
    with pytest.raises(PocketclipError, match="no such folder"):
        plugin.source("none", tmp_path)
