"""Masked language modelling: what may be hidden, and where the image comes in."""

import torch
from tiny import END, START, tiny_clip

from compress.token_losses import MaskedLanguage, text_hidden, unit_text_tokens


def test_only_words_are_hidden_and_never_none() -> None:
    clip = tiny_clip()
    tokens = clip.tokenizer(["a", "a longer text", "", "bcd"])
    _, _, real = unit_text_tokens(clip.model.text, tokens)
    language = MaskedLanguage(clip.model.text, 16)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        shown, hidden = language.hide(tokens, real)
        words = (tokens != START) & (tokens != END) & (tokens != 0)
        assert not hidden[~words].any() and hidden.any()
        assert (shown[hidden] == 0).all() and torch.equal(shown[~hidden], tokens[~hidden])
        shares.append(float(hidden[words].float().mean()))
    # 17 words, 15 % of them, 40 draws: standard error 1.4 points; the least draw adds up to 1 word
    assert 0.1 < sum(shares) / len(shares) < 0.25


def test_the_image_is_added_before_every_second_block_only_while_asked() -> None:
    clip = tiny_clip(layers=3)
    tower, tokens = clip.model.text, clip.tokenizer(["ab", "cde"])
    language, u = MaskedLanguage(tower, 16), torch.randn(2, 16)
    assert language.layers == [0, 2]
    with torch.no_grad():
        before = text_hidden(tower, tokens)
        with language.fused(tower, u):
            fused = text_hidden(tower, tokens)
        for projection in language.fusion:
            projection.weight.zero_()
            projection.bias.zero_()
        with language.fused(tower, u):
            torch.testing.assert_close(text_hidden(tower, tokens), before)
    assert not torch.allclose(fused, before, atol=1e-3)
    assert torch.equal(text_hidden(tower, tokens), before)
