"""Tokenizers of other libraries as ours: a `tokenizers` file that cleans, and what stands around.

What upstream code does to a text before it tokenizes becomes part of the file's normalizer, so
that any reader of the file repeats it.
"""

import functools
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, normalizers, processors

from compress.errors import PocketclipError
from compress.tokenizer import Tokenizer, TokenizerContract, byte_pairs, marks, read

FILES = ("tokenizer.json", "tokenizer_config.json")


def openai_tokenizer(context_length: int = 77, lowercase: bool = True) -> Tokenizer:
    """The tokenizer of OpenAI's CLIP, from the merges that open_clip carries."""
    file, start_id, end_id = _openai_file()
    contract = TokenizerContract(
        lowercase=lowercase,
        context_length=context_length,
        start_id=start_id,
        end_id=end_id,
        pad_id=0,
    )
    return Tokenizer(file, contract)


@functools.cache
def _openai_file() -> tuple[tokenizers.Tokenizer, int, int]:
    """OpenAI's vocabulary as a tokenizer file, its start and its end id."""
    from open_clip.tokenizer import SimpleTokenizer

    theirs = SimpleTokenizer()
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    special = [theirs.decoder[token] for token in theirs.all_special_ids]
    file = repairing(byte_pairs(theirs.encoder, merges, special))
    return file, theirs.sot_token_id, theirs.eot_token_id


def before(tokenizer: tokenizers.Tokenizer, steps: list[Any]) -> tokenizers.Tokenizer:
    """The same tokenizer with steps before its own normalizer, in place."""
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([*steps, *own])
    return tokenizer


def repairing(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer after those repairs of ftfy that work character by character.

    Ligatures, full-width forms, curly quotes, control characters and composed accents: what
    open_clip's cleanup changes in sound text, most of all in Chinese punctuation.
    """
    from ftfy import chardata

    spelled = {**chardata.LIGATURES, **chardata.WIDTH_MAP}
    controls = "".join(chr(code) for code in chardata.CONTROL_CHARS)
    steps = [normalizers.Replace(chr(code), str(text)) for code, text in spelled.items()]
    steps += [
        normalizers.Replace(Regex(chardata.SINGLE_QUOTE_RE.pattern), "'"),
        normalizers.Replace(Regex(chardata.DOUBLE_QUOTE_RE.pattern), '"'),
        normalizers.Replace(Regex(f"[{re.escape(controls)}]"), ""),
    ]
    return before(tokenizer, [*steps, normalizers.NFC()])


def canonical(
    tokenizer: tokenizers.Tokenizer, underscore: str, lowercase: bool = True
) -> tokenizers.Tokenizer:
    """The same tokenizer after SigLIP's canonicalisation (big_vision): no ASCII punctuation.

    underscore: what `_` becomes first, a space in open_clip, nothing in transformers.
    """
    steps = [
        normalizers.Replace("_", underscore),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        *([normalizers.Lowercase()] if lowercase else []),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    return before(tokenizer, steps)


def without_end_mark(tokenizer: tokenizers.Tokenizer, pad_id: int) -> tokenizers.Tokenizer:
    """The same tokenizer with padding where its end mark stood (CLIPA cuts BERT's [SEP])."""
    start_id, end_id = marks(tokenizer)
    assert start_id is not None and end_id is not None, "BERT's tokenizer has one mark at each end"
    start, pad = tokenizer.id_to_token(start_id), tokenizer.id_to_token(pad_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {pad}", special_tokens=[(start, start_id), (pad, pad_id)]
    )
    return tokenizer


def from_folder(
    folder: Path, file: tokenizers.Tokenizer, context_length: int, lowercase: bool = False
) -> Tokenizer:
    """The marks that a folder's tokenizer file adds, and the padding that its settings name."""
    config = settings(folder)
    start_id, end_id = marks(file)
    if end_id is None:
        raise PocketclipError(f"{folder}: not supported yet: a tokenizer without an end mark")
    contract = TokenizerContract(
        lowercase=lowercase,
        context_length=context_length,
        start_id=start_id,
        end_id=end_id,
        pad_id=padding(folder, file, config),
    )
    return Tokenizer(file, contract)


def tokenizer_file(folder: Path) -> tokenizers.Tokenizer:
    """The folder's tokenizer.json; where it is missing, the error says how to make one."""
    if (folder / FILES[0]).is_file():
        return read(folder / FILES[0])
    others = [
        name
        for name in ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
        if (folder / name).is_file()
    ]
    made = (
        f"there is {others[0]}: make it with transformers' "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        if others
        else "copy tokenizer.json and tokenizer_config.json from the model's repository"
    )
    raise PocketclipError(f"{folder / FILES[0]}: no such file; {made}")


def settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    path = folder / FILES[1]
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PocketclipError(f"{path}: not JSON: {error}") from None
    return data if isinstance(data, dict) else {}


def padding(folder: Path, file: tokenizers.Tokenizer, config: Mapping[str, Any]) -> int:
    """Id that fills texts up, as the settings name it."""
    pad = config.get("pad_token")
    pad_id = file.token_to_id(pad["content"] if isinstance(pad, dict) else str(pad))
    if pad_id is None:
        raise PocketclipError(f"{folder / FILES[1]}: pad_token {pad!r} is not in tokenizer.json")
    if config.get("padding_side", "right") != "right":
        raise PocketclipError(f"{folder / FILES[1]}: texts padded at the left are not supported")
    return pad_id
