"""From text to token ids: a `tokenizers` file for the raw ids, and a contract for the rest.

`tokenizer.json` gives the ids of a cleaned text without start and end marks. The contract says how
text is cleaned before, how long a text may be, which marks stand around it and what pads it.
Any language can read both. open_clip also guesses at mis-decoded text (ftfy) and at HTML entities
before it tokenizes; that cannot be written down in a page, so it isn't part of the contract: sound
text gets the same ids, `&amp;` and `cafÃ©` do not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from pydantic import BaseModel, ConfigDict
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from torch import Tensor

from compress import atomic
from compress.errors import PocketclipError

# How CLIP splits text into words: English endings, letters, single digits, anything else but space.
# It ignores case, and case folding turns the long s into s.
WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class TokenizerContract(BaseModel):
    """What stands around the raw ids of a text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lowercase: bool
    """Whether the text is lower-cased before the tokenizer sees it."""
    context_length: int
    """Number of ids per text, marks and padding included."""
    start_id: int | None
    """Id before the text; None if tokenizer.json adds its own marks."""
    end_id: int
    """Id after the text, kept when the text is cut."""
    pad_id: int
    """Id that fills up to context_length."""
    truncation: Literal["keep_end_id"] = "keep_end_id"
    """An over-long text loses its last ids, never the end id."""
    text_cleanup: Literal["whitespace"] = "whitespace"
    """Runs of white space become one space, none at the ends."""


class Tokenizer:
    """Texts to a batch of token ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, contract: TokenizerContract) -> None:
        self.contract = contract
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        if contract.start_id is None:
            # Only the file's own truncation knows which of its marks to keep.
            self.tokenizer.enable_truncation(contract.context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> int32 [B, L]."""
        own_marks = self.contract.start_id is None
        cleaned = [self.clean(text) for text in texts]
        encoded = self.tokenizer.encode_batch(cleaned, add_special_tokens=own_marks)
        rows = [self._padded(encoding.ids) for encoding in encoded]
        return torch.tensor(rows, dtype=torch.int32).view(len(rows), self.contract.context_length)

    def clean(self, text: str) -> str:
        """The text as the tokenizer file sees it."""
        text = " ".join(text.split())
        return text.lower() if self.contract.lowercase else text

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into a folder."""
        atomic.write_text(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))

    @classmethod
    def load(cls, path: Path, contract: TokenizerContract) -> "Tokenizer":
        """Open a `tokenizers` file; PocketclipError if it is missing or not one."""
        return cls(read(path), contract)

    def _padded(self, ids: list[int]) -> list[int]:
        contract = self.contract
        if contract.start_id is not None:
            ids = [contract.start_id, *ids[: contract.context_length - 2], contract.end_id]
        return ids + [contract.pad_id] * (contract.context_length - len(ids))


def read(path: Path) -> tokenizers.Tokenizer:
    """A `tokenizers` file; PocketclipError if it is missing or not one."""
    if not path.is_file():
        raise PocketclipError(f"{path}: no such file; the tokenizer's tokenizer.json belongs there")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises no narrower class
        raise PocketclipError(f"{path}: not a tokenizer.json: {error}") from None


def byte_pairs(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], special: Sequence[str]
) -> tokenizers.Tokenizer:
    """CLIP's byte-level BPE from its vocabulary and merges, the first learnt merge first.

    special: marks in the vocabulary that are matched whole where a text spells them out.
    """
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix="</w>")
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer


def marks(tokenizer: tokenizers.Tokenizer) -> tuple[int | None, int | None]:
    """The ids that a tokenizer file puts before and after a text; None where it isn't just one."""
    bare = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    bare.no_padding()
    bare.no_truncation()
    raw = bare.encode("a", add_special_tokens=False).ids
    whole = bare.encode("a", add_special_tokens=True).ids
    before = next(i for i in range(len(whole) + 1) if whole[i : i + len(raw)] == raw)
    after = whole[before + len(raw) :]
    return (whole[0] if before == 1 else None, after[0] if len(after) == 1 else None)
