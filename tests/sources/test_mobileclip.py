"""Apple's own checkpoints as ours: names, folded branches, the convolutional text tower."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.experiments import apple_files
from benchmarks.experiments.apple_files import block, in_training_form
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.layers import MixerBlock
from compress.sources import _mobileclip, mobileclip


def test_text_block_is_its_training_form_folded() -> None:
    state = block(12, 5)
    ours = MixerBlock(12, 48, 5, "gelu")
    ours.load_state_dict(_mobileclip._mixer(state))
    x = torch.randn(2, 9, 12)
    expected = in_training_form(x, state)
    with torch.no_grad():
        found = ours(x)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("write", [apple_files.s0, apple_files.second_s0])
def test_apples_files_embed_as_upstream(
    write: Callable[[Path], tuple[Clip, nn.Module, nn.Module]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    clip, image, text = write(tmp_path)
    pixels, tokens = torch.randn(1, 3, 256, 256), clip.tokenizer(["", "a photo of a cat"])
    pairs = [
        (clip.model.encode_image(pixels), image(pixels)),
        (clip.model.encode_text(tokens), text(tokens.long())),
    ]
    for found, expected in pairs:
        scale = expected.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=3e-6)
    assert (clip.preprocess.mean, clip.preprocess.interpolation) == ((0.0,) * 3, "bilinear")


@pytest.mark.parametrize("write", [apple_files.s0, apple_files.second_s0])
def test_apples_files_carry_their_licence(write: Callable[[Path], Any], tmp_path: Path) -> None:
    clip, *_ = write(tmp_path)
    assert "research purposes only" in clip.license and clip.provenance[0]["research_only"]


@pytest.mark.parametrize("name", ["S7/random", "S0", "S1@missing.pt"])
def test_wrong_names_get_a_remedy(name: str) -> None:
    with pytest.raises(PocketclipError, match=r"mobileclip_s[01]\.pt"):
        mobileclip.load(name)
