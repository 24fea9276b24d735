"""A smaller vocabulary: the tokens that a corpus needs, and those that unknown words fall back to.

Texts of the corpus keep their tokens: every merge that they use is kept, and a merge that none of
them uses cannot have been chosen before one of theirs. Other words still tokenize, into shorter
pieces down to single bytes or letters.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from compress.errors import PocketclipError
from compress.tokenizer import Tokenizer


def trim(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with what `texts` need -> it, and the old ids it keeps, ascending.

    Row n of the new token table is row kept[n] of the old one. Raises PocketclipError for a kind of
    tokenizer that isn't known here, or if a text would get other tokens.
    """
    raw = json.loads(tokenizer.tokenizer.to_str())
    own_marks = tokenizer.contract.start_id is None
    cleaned = [tokenizer.clean(text) for text in dict.fromkeys(texts)]
    encoded = tokenizer.tokenizer.encode_batch(cleaned, add_special_tokens=own_marks)
    ids = {i for encoding in encoded for i in encoding.ids}
    kept = sorted(_needed(raw, ids) | _marks(raw, tokenizer))
    place = {old: new for new, old in enumerate(kept)}
    contract = tokenizer.contract.model_copy(
        update={
            key: place[value]
            for key in ("start_id", "end_id", "pad_id")
            if (value := getattr(tokenizer.contract, key)) is not None
        }
    )
    smaller = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(_renumber(raw, place))), contract)
    _same_tokens(tokenizer, smaller, cleaned, kept)
    return smaller, kept


def _needed(raw: dict[str, Any], ids: set[int]) -> set[int]:
    """Ids of the corpus's tokens, of what they are made of, and of what anything is made of."""
    model = raw["model"]
    if model["type"] == "BPE":
        return _merged_from(model, ids)
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        letters = {i for t, i in model["vocab"].items() if len(t.removeprefix(prefix)) == 1}
        return ids | letters | {model["vocab"][model["unk_token"]]}
    if model["type"] == "Unigram":
        pieces = enumerate(piece for piece, _ in model["vocab"])
        single = {n for n, piece in pieces if len(piece) == 1 or piece.startswith("<0x")}
        return ids | single | ({model["unk_id"]} if model["unk_id"] is not None else set())
    raise PocketclipError(f"vocabulary: a {model['type']} tokenizer cannot be trimmed")


def _merged_from(model: dict[str, Any], ids: set[int]) -> set[int]:
    """For byte pairs: the tokens that merges make the given ones from, and all unmerged ones."""
    vocabulary: dict[str, int] = model["vocab"]
    token = {i: t for t, i in vocabulary.items()}
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in _pairs(model):
        parts.setdefault(left + right, []).append((left, right))
    found = {t for t in vocabulary if t not in parts and not t.startswith("<unused")}
    waiting = [token[i] for i in ids if i in token]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [part for pair in parts.get(current, ()) for part in pair]
    return {vocabulary[t] for t in found} | ids


def _marks(raw: dict[str, Any], tokenizer: Tokenizer) -> set[int]:
    contract = tokenizer.contract
    marks = {contract.end_id, contract.pad_id} | {t["id"] for t in raw["added_tokens"]}
    return marks if contract.start_id is None else marks | {contract.start_id}


def _renumber(raw: dict[str, Any], place: dict[int, int]) -> dict[str, Any]:
    """The tokenizer file with only the ids in `place`, by their new numbers."""
    model = raw["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in place if old < len(model["vocab"])]
        if model["unk_id"] is not None:
            model["unk_id"] = place[model["unk_id"]]
    else:
        model["vocab"] = {t: place[i] for t, i in model["vocab"].items() if i in place}
    if model["type"] == "BPE":
        whole = model["vocab"]
        merges = [list(p) for p in _pairs(model) if {*p, p[0] + p[1]} <= whole.keys()]
        model["merges"] = merges
    for mark in raw["added_tokens"]:
        mark["id"] = place[mark["id"]]
    if raw.get("post_processor"):
        raw["post_processor"] = _processor(raw["post_processor"], place)
    return raw


def _processor(processor: dict[str, Any], place: dict[int, int]) -> dict[str, Any]:
    """The step that adds a tokenizer's own marks, by their new numbers."""
    if processor["type"] == "Sequence":
        steps = [_processor(step, place) for step in processor["processors"]]
        return {**processor, "processors": steps}
    if processor["type"] == "TemplateProcessing":
        for mark in processor["special_tokens"].values():
            mark["ids"] = [place[i] for i in mark["ids"]]
    for key in ("sep", "cls"):
        if key in processor:
            processor[key][1] = place[processor[key][1]]
    return processor


def _pairs(model: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Merges, which older files write as one string."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _same_tokens(old: Tokenizer, new: Tokenizer, texts: list[str], kept: list[int]) -> None:
    marks = old.contract.start_id is None
    before = old.tokenizer.encode_batch(texts, add_special_tokens=marks)
    after = new.tokenizer.encode_batch(texts, add_special_tokens=marks)
    for text, a, b in zip(texts, before, after, strict=True):
        if a.ids != [kept[i] for i in b.ids]:
            raise PocketclipError(
                f"vocabulary: {text!r} would get other tokens ({b.tokens} for {a.tokens}); "
                "this tokenizer cannot be trimmed without loss: set vocabulary: keep"
            )
