"""The tokenizer contract against open_clip's tokenizers."""

from pathlib import Path

import pytest
import tokenizers
import torch
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import models, pre_tokenizers, processors, trainers

from compress.errors import PocketclipError
from compress.sources._text_files import openai_tokenizer
from compress.tokenizer import Tokenizer, TokenizerContract, marks

# Sound text: neither mis-decoded nor with HTML entities, which open_clip guesses at.
TEXTS = [
    "",
    "   \t \n ",
    "a photo of a cat",
    "A Photo of   a\tCAT\n",
    "\u3000wide\u2003spaces\xa0and\u2028lines \x0b ",
    "it's we're I'VE they'll 'D o'clock",
    "1234 5.67 x² ½ Ⅷ",
    "hello!!! --- (world) #hashtag @name <tag>",
    "café naïve ÜBER Straße smørbrød İstanbul ΣΟΦΟΣ",
    "cafe\u0301 decomposed",
    "一张猫的照片。",
    "你好，世界！（ＡＢＣ）１２３ ｶﾞｷﾞ",
    "“curly” quotes, it’s a ‘cat’ — ﬁne ﬂuﬀy Ĳ",
    "bell\x07 and \x7fdelete",
    "猫の写真、고양이 사진",
    "صورة قطة बिल्ली की तस्वीर รูปแมว",
    "😀 👍🏽 👩‍👩‍👧‍👦 ❤️ 🇩🇪 🏳️‍🌈",
    "\u200bzero\u200bwidth\ufeff",
    "a <end_of_text> spelled out <start_of_text>",
    "word " * 200,
    "x" * 600,
    "猫" * 120,
    "😀" * 100,
]


@pytest.fixture(scope="module")
def openai() -> Tokenizer:
    return openai_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_open_clip(openai: Tokenizer, text: str) -> None:
    assert openai([text]).tolist() == SimpleTokenizer()([text]).tolist()


def test_ids_equal_open_clip_at_every_length_around_the_cut(openai: Tokenizer) -> None:
    texts = ["cat " * n for n in range(73, 79)]
    assert openai(texts).tolist() == SimpleTokenizer()(texts).tolist()
    assert openai(texts)[:, -1].tolist() == [0, 0, 49407, 49407, 49407, 49407]


def test_case_is_kept_where_the_contract_says_so() -> None:
    ours = openai_tokenizer(context_length=16, lowercase=False)
    theirs = SimpleTokenizer(context_length=16, clean="whitespace")
    texts = ["A Cat", "a cat"]
    assert ours(texts).tolist() == theirs(texts).tolist()
    assert ours(texts)[0].tolist() != ours(texts)[1].tolist()


@pytest.mark.parametrize(("damaged", "sound"), [("&amp;", "&"), ("cafÃ©", "café")])
def test_damaged_text_stays_damaged(openai: Tokenizer, damaged: str, sound: str) -> None:
    assert openai([damaged]).tolist() != openai([sound]).tolist()
    assert SimpleTokenizer()([damaged]).tolist() == SimpleTokenizer()([sound]).tolist()


def test_batch_has_one_int32_row_per_text(openai: Tokenizer) -> None:
    tokens = openai(TEXTS)
    assert tokens.dtype == torch.int32 and tokens.shape == (len(TEXTS), 77)
    assert openai([]).shape == (0, 77)


def replay(text: str, file: Path, contract: TokenizerContract) -> list[int]:
    """Ids from the written file and contract alone, as a reader of a bundle gets them."""
    text = " ".join(text.split())
    raw = tokenizers.Tokenizer.from_file(str(file))
    length = contract.context_length
    ids = raw.encode(
        text.lower() if contract.lowercase else text, add_special_tokens=contract.start_id is None
    ).ids
    if contract.start_id is not None:
        ids = [contract.start_id, *ids[: length - 2], contract.end_id]
    return [*ids, *[contract.pad_id] * (length - len(ids))][:length]


def test_written_file_and_contract_give_the_same_ids(openai: Tokenizer, tmp_path: Path) -> None:
    openai.save(tmp_path)
    for text, ids in zip(TEXTS, openai(TEXTS).tolist(), strict=True):
        assert replay(text, tmp_path / "tokenizer.json", openai.contract) == ids
    again = Tokenizer.load(tmp_path / "tokenizer.json", openai.contract)
    assert again(TEXTS).tolist() == openai(TEXTS).tolist()


def small_tokenizer(template: str) -> tokenizers.Tokenizer:
    """A byte-level BPE of 300 ids with marks around a text as `template` says."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a photo of a cat", "an emoji of a dog", "the cat sat"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [("<s> $A </s>", (1, 2)), ("$A </s>", (None, 2)), ("<s> <s> $A </s>", (None, 2))],
)
def test_marks_are_found_in_a_tokenizer_file(
    template: str, expected: tuple[int | None, int | None]
) -> None:
    assert marks(small_tokenizer(template)) == expected


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>"])
def test_ids_equal_transformers(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = small_tokenizer(template)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=file, pad_token="<pad>")
    start_id, end_id = marks(file)
    assert end_id is not None
    contract = TokenizerContract(
        lowercase=False, context_length=12, start_id=start_id, end_id=end_id, pad_id=0
    )
    ours = Tokenizer(file, contract)
    texts = [" ".join(text.split()) for text in TEXTS if "of_text>" not in text]
    expected = theirs(texts, max_length=12, padding="max_length", truncation=True)["input_ids"]
    assert ours(texts).tolist() == expected
    ours.save(tmp_path)
    for text, ids in zip(texts, expected, strict=True):
        assert replay(text, tmp_path / "tokenizer.json", contract) == ids


def test_marks_are_found_behind_a_files_own_padding_and_truncation() -> None:
    file = small_tokenizer("<s> $A </s>")
    wanted = marks(file)
    file.enable_padding(length=12)
    file.enable_truncation(12)
    assert marks(file) == wanted and None not in wanted


def test_missing_and_broken_files_are_named(openai: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path / "tokenizer.json", openai.contract)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(PocketclipError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json", openai.contract)
