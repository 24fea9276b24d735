"""A tokenizer.json that needs no contract beside it, for readers that know only the file.

White space, case, marks, truncation and padding stand inside. Where the contract is known too, the
same file still gives the raw ids: its clean-up changes nothing in a text that is clean already.
"""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers

from compress.clip import Clip
from export.open_clip import marked_tokenizer

# What Python's str.split splits at; regular expressions leave out the separators 1C to 1F.
SPACE = r"[\s\x1c-\x1f\x85]+"


def self_contained(clip: Clip) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json as text and as data.

    Case is changed letter by letter here, so that a Greek word's last sigma gets another id than
    the contract's. Raises PocketclipError where the tokenizer has no token for a mark.
    """
    text, settings = marked_tokenizer(clip)
    contract, tokenizer = clip.tokenizer.contract, Tokenizer.from_str(text)
    steps = [normalizers.Replace(Regex(SPACE), " "), normalizers.Strip()]
    if contract.lowercase:
        steps.append(normalizers.Lowercase())
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([*steps, *own])
    pad = settings["pad_token"]
    tokenizer.enable_truncation(contract.context_length)
    tokenizer.enable_padding(
        length=contract.context_length, pad_token=pad, pad_id=tokenizer.token_to_id(pad)
    )
    return tokenizer.to_str(pretty=True), settings


def as_json(settings: dict[str, Any]) -> str:
    """Settings as the text of a file."""
    return json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
