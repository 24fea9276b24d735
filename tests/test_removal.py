"""Which patches attentive removal keeps, against what the forward pass itself attends to."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_clip
from torch import Tensor, nn

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.layers import Attention
from compress.learner import Learner
from compress.model import ClipModel, initialise_
from compress.removal import attended, attention_scores
from compress.schedule import Reduction
from compress.stages.distill import Config


def clip_with(vision: dict[str, object]) -> Clip:
    clip = tiny_clip()
    config = clip.model.config
    changed = config.vision.model_copy(update=vision)
    model = ClipModel(config.model_copy(update={"vision": changed}))
    initialise_(model)
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        nn.init.normal_(attention.qkv.weight, std=0.4)  # so that patches differ
    return replace(clip, model=model.eval())


@pytest.mark.parametrize("vision", [{}, {"class_token": False, "pooling": "mean"}])
def test_scores_are_the_attention_that_patches_get(vision: dict[str, object]) -> None:
    tower, pixels = clip_with(vision).model.image, torch.randn(3, 3, 32, 32)
    seen: list[Tensor] = []
    for attention in (m for m in tower.modules() if isinstance(m, Attention)):
        attention.probabilities.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        tower(pixels)
    layers = seen[:]
    assert len(layers) == 2 and layers[0].shape[:2] == (3, 4)
    expected = torch.zeros(3, 16)
    for probabilities in layers:  # [B, H, T, T]
        for head in range(4):
            own = probabilities[:, head]
            asked = own[:, :1, 1:] if "class_token" not in vision else own
            expected += asked.mean(dim=1) / 8
    torch.testing.assert_close(attention_scores(tower, pixels), expected)
    best = [sorted(row.argsort(descending=True)[:5].tolist()) for row in expected]
    assert attended(tower, pixels, 5).tolist() == best


@pytest.mark.parametrize("settings", [{"removal": "attentive"}, {"matching": 1.0}])
def test_a_block_that_sees_one_token_is_refused(settings: dict[str, object]) -> None:
    clip = clip_with({"last_block": "pooled"})
    with pytest.raises(PocketclipError, match=r"image tower's last block.*put the exact stage"):
        Learner(clip, Config.model_validate(settings), (16,), clip.model.config)


def test_a_tower_that_merges_tokens_is_refused() -> None:
    sites = [{"layer": 1, "keep": 9}]
    clip = clip_with({"reduction": Reduction.model_validate({"method": "tome", "sites": sites})})
    with pytest.raises(PocketclipError, match="put prune_tokens after distill"):
        Learner(clip, Config(removal="attentive"), (16,), clip.model.config)
