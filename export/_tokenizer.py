"""A tokenizer.json that needs no contract beside it, for readers that know only the file.

White space, case, marks, truncation and padding stand inside. Where the contract is known too, the
same file still gives the raw ids: its clean-up changes nothing in a text that is clean already.
"""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, processors

from compress.clip import Clip
from compress.errors import PocketclipError

# What Python's str.split splits at; regular expressions leave out the separators 1C to 1F.
SPACE = r"[\s\x1c-\x1f\x85]+"


def self_contained(clip: Clip) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json as text and as data.

    Case is changed letter by letter here, so that a Greek word's last sigma gets another id than
    the contract's. Raises PocketclipError where the tokenizer has no token for a mark.
    """
    contract = clip.tokenizer.contract
    tokenizer = Tokenizer.from_str(clip.tokenizer.tokenizer.to_str())
    names = _marks(clip, tokenizer)
    if contract.start_id is not None:
        start, end = names["bos_token"], names["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}",
            special_tokens=[(start, contract.start_id), (end, contract.end_id)],
        )
    steps = [normalizers.Replace(Regex(SPACE), " "), normalizers.Strip()]
    if contract.lowercase:
        steps.append(normalizers.Lowercase())
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([*steps, *own])
    pad, length = names["pad_token"], contract.context_length
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer.to_str(pretty=True), settings


def as_json(settings: dict[str, Any]) -> str:
    """Settings as the text of a file."""
    return json.dumps(settings, indent=1, ensure_ascii=False) + "\n"


def _marks(clip: Clip, tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens of the marks; no start where the file adds marks of its own.

    A tower that doesn't see padding is padded with the end mark: a pad token of its own would be
    cut out of a text that spells it.
    """
    contract = clip.tokenizer.contract
    unseen = getattr(clip.model.config.text, "sees_no_padding", False)
    ids = {
        "bos_token": contract.start_id,
        "eos_token": contract.end_id,
        "pad_token": contract.end_id if unseen else contract.pad_id,
    }
    names = {role: tokenizer.id_to_token(i) for role, i in ids.items() if i is not None}
    missing = [f"{role} {ids[role]}" for role, name in names.items() if name is None]
    if missing:
        raise PocketclipError(
            f"{clip.name}: tokenizer.json has no token for {', '.join(missing)}; readers of the "
            "file alone know marks by name"
        )
    return {role: name for role, name in names.items() if name is not None}
