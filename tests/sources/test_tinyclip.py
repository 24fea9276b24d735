"""TinyCLIP's checkpoints as ours: irregular shapes read off the weights."""

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from tiny import tiny_clip
from torch import nn

from benchmarks.experiments import model_files
from benchmarks.experiments.model_files import (
    image_written_out,
    irregular,
    text_written_out,
    wrapped,
)
from compress import clip as clips
from compress.errors import PocketclipError
from compress.model import ClipModel, initialise_
from compress.sources import _plain, tinyclip


@torch.no_grad()
def test_shapes_come_back_from_the_weights(tmp_path: Path) -> None:
    state = model_files.tinyclip(tmp_path / "a.pt")
    clip = tinyclip.load(str(tmp_path / "a.pt"))
    assert clip.model.config == irregular()
    pixels, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(["", "a photo of a cat"])
    pairs = [
        (clip.model.encode_image(pixels), image_written_out(state, pixels)),
        (clip.model.encode_text(tokens), text_written_out(state, tokens.long())),
    ]
    for found, expected in pairs:
        scale = expected.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=3e-6)
    clips.save(clip, tmp_path / "saved")
    again = clips.load(tmp_path / "saved")
    found, expected = again.model.encode_image(pixels), clip.model.encode_image(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (clip.license, clip.name) == ("mit", "a")


@torch.no_grad()
def test_a_branch_that_pruning_removed_adds_nothing(tmp_path: Path) -> None:
    model = ClipModel(irregular())
    initialise_(model)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    state = _plain.their_names(model.state_dict())
    gone = "visual.transformer.resblocks.1."
    kept = {k: v for k, v in state.items() if not k.startswith((f"{gone}attn", f"{gone}ln_1"))}
    torch.save(kept, tmp_path / "a.pt")
    clip = tinyclip.load(f"quick_gelu@{tmp_path / 'a.pt'}")
    assert clip.model.config.vision.activation == "quick_gelu"
    block = model.image.blocks[1]
    for parameter in (block.attention.out.weight, block.attention.out.bias):
        parameter.zero_()
    pixels = torch.randn(1, 3, 32, 32)
    expected = replace(tiny_clip(), model=model).model.encode_image(pixels)
    plain = tinyclip.load(str(tmp_path / "a.pt")).model.encode_image(pixels)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_resnets_embed_as_open_clip(tmp_path: Path) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
    text = {"context_length": 77, "width": 64, "heads": 1, "layers": 1}
    theirs = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
    torch.save(wrapped(theirs.state_dict()), tmp_path / "a.pt")
    ours = tinyclip.load(str(tmp_path / "a.pt")).model
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels))


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(PocketclipError, match=r"a\.pt: not a checkpoint of TinyCLIP"):
        tinyclip.load(str(tmp_path / "a.pt"))
    with pytest.raises(PocketclipError, match="activation 'relu' is unknown: gelu, quick_gelu"):
        tinyclip.load(f"relu@{tmp_path / 'a.pt'}")
