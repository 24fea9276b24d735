"""Smaller vocabularies: the corpus keeps its tokens, and any other text still has some."""

from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors, trainers

from compress.clip import load
from compress.errors import PocketclipError
from compress.sources import open_clip
from compress.stages.exact import trimmed
from compress.tokenizer import Tokenizer, TokenizerContract
from compress.vocabulary import trim

EMOJI = Path(__file__).parents[1] / "recipes/emoji"
CORPUS = ["a small red square", "smaller squares", "the tallest tower of all", "reddest"]
OTHERS = ["an unheard-of zebra", "naïve café 東京 🙂", "", "!!!", "smallest tower"]


def trained(kind: str) -> Tokenizer:
    """A tokenizer of one of the three kinds, with its own marks around a text."""
    model, trainer = {
        "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer),
        "BPE": (models.BPE(), trainers.BpeTrainer),
    }[kind]
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    more = {"unk_token": "[UNK]"} if kind == "Unigram" else {}
    texts = [*CORPUS, *OTHERS, "zebras heard of towers", "cafés and squares"] * 5
    raw.train_from_iterator(texts, trainer(vocab_size=120, special_tokens=marks, **more))
    pair = [(mark, raw.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    contract = TokenizerContract(
        lowercase=True, context_length=24, start_id=None, end_id=pair[1][1], pad_id=3
    )
    return Tokenizer(raw, contract)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE"])
def test_the_corpus_keeps_its_tokens(kind: str) -> None:
    old = trained(kind)
    new, kept = trim(old, CORPUS)
    assert kept == sorted(kept) and len(kept) < old.tokenizer.get_vocab_size()
    assert torch.equal(torch.tensor(kept)[new(CORPUS).long()], old(CORPUS).long())
    assert kept[new.contract.end_id] == old.contract.end_id


def test_the_shipped_table_shrinks_and_no_embedding_moves() -> None:
    clip = open_clip.load(f"local-dir:{EMOJI / 'teacher'}")
    texts = ["grinning face", "an emoji of a red heart", "flag: Japan", "woman astronaut"]
    small = trimmed(clip, texts)
    rows = small.model.text.token.weight.shape[0]
    saved = clip.model.text.token.weight.numel() - small.model.text.token.weight.numel()
    assert rows < 1000 and saved == (4096 - rows) * 256
    total = lambda c: sum(p.numel() for p in c.model.parameters())  # noqa: E731
    assert total(clip) - total(small) == saved
    with torch.no_grad():
        wanted, found = (c.model.encode_text(c.tokenizer(texts)) for c in (clip, small))
    assert torch.equal(wanted, found)


def test_unknown_words_fall_back_to_bytes() -> None:
    clip = open_clip.load(f"local-dir:{EMOJI / 'teacher'}")
    small = trimmed(clip, ["grinning face"])
    for text in OTHERS:
        raw = small.tokenizer.tokenizer
        ids = raw.encode(small.tokenizer.clean(text)).ids
        shown = raw.decode(ids).replace(" ", "")
        assert shown == small.tokenizer.clean(text).replace(" ", "")


def test_a_trimmed_model_saves_and_loads(tmp_path: Path) -> None:
    from compress.clip import save

    small = trimmed(open_clip.load(f"local-dir:{EMOJI / 'teacher'}"), CORPUS)
    save(small, tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.tokenizer(OTHERS), small.tokenizer(OTHERS))
    assert again.tokenizer.contract.end_id == again.model.config.text.vocab_size - 1


def test_a_tokenizer_of_unknown_kind_is_refused() -> None:
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    contract = TokenizerContract(
        lowercase=True, context_length=4, start_id=None, end_id=1, pad_id=0
    )
    with pytest.raises(PocketclipError, match="a WordLevel tokenizer cannot be trimmed"):
        trim(Tokenizer(raw, contract), ["a"])
