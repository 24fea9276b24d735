"""Batches: distinct concepts, and shortcuts that change no embedding."""

import pytest
import torch
import torch.nn.functional as F

from compress.batches import NameBank, Sampler, embed_images, embed_names, embed_texts
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.work import Data


def test_a_batch_never_holds_a_concept_twice(data: Data) -> None:
    sampler = Sampler(data.pairs)
    for seed in range(5):
        indices, groups = sampler.draw(6, torch.Generator().manual_seed(seed))
        assert len(set(groups.tolist())) == 6
        assert data.pairs.concepts is not None
        for index, group in zip(indices.tolist(), groups.tolist(), strict=True):
            assert data.pairs.concepts[index] == sampler.concepts[group]
    with pytest.raises(PocketclipError, match="more than the 8 different concepts"):
        sampler.draw(9, torch.Generator())


def test_bucketed_texts_embed_as_fully_padded_ones(clip: Clip) -> None:
    texts = ["", "a", "a longer text", "x" * 50, "ab"] * 40
    tokens = clip.tokenizer(texts)
    with torch.no_grad():
        padded = F.normalize(clip.model.encode_text(tokens), dim=-1)
        torch.testing.assert_close(embed_texts(clip.model.text, tokens), padded, rtol=0, atol=1e-5)


def test_chunked_images_embed_as_one_batch(clip: Clip) -> None:
    pixels = torch.randn(150, 3, 32, 32)
    with torch.no_grad():
        whole = F.normalize(clip.model.encode_image(pixels), dim=-1)
        torch.testing.assert_close(embed_images(clip.model.image, pixels), whole, rtol=0, atol=1e-5)


def test_keeping_all_patches_changes_nothing(clip: Clip) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    every = torch.stack([torch.randperm(16), torch.arange(16)])
    with torch.no_grad():
        kept = clip.model.image(pixels, keep=every)
        torch.testing.assert_close(kept, clip.model.image(pixels), rtol=0, atol=1e-5)
        fewer = clip.model.image(pixels, keep=every[:, :8])
    assert (fewer - kept).abs().max() > 1e-3


def test_names_are_averaged_over_templates(clip: Clip) -> None:
    one, two = (embed_names(clip, ["red bar"], [t])[0] for t in ("{}", "a {}"))
    both = embed_names(clip, ["red bar"], ["{}", "a {}"])[0]
    torch.testing.assert_close(both, F.normalize(one + two, dim=0))


def test_the_bank_refreshes_on_its_steps_only(clip: Clip) -> None:
    bank = NameBank(clip, ["red bar", "blue bar"], ["{}"], every=3)
    first = bank.at(0)
    with torch.no_grad():
        clip.model.text.projection.weight.normal_()
    assert torch.equal(bank.at(2), first)
    assert not torch.equal(bank.at(3), first)
