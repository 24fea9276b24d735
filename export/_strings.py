"""A contract's tokenizer as ONNX nodes of onnxruntime-extensions: strings in, ids out.

Byte-level pairs only: CLIP's own (words end in </w>) and GPT-2's. What a tokenizer file does to a
text beyond white space and case is not repeated; whoever attaches compares ids.
"""

import json
from typing import Any

import numpy as np

from compress.errors import PocketclipError
from compress.tokenizer import Tokenizer
from export import _graph

PREFIX = "words"
NAME = "text"
OPERATORS = {"</w>": "CLIPTokenizer", None: "GPT2Tokenizer", "": "GPT2Tokenizer"}
MARKS = ("<|startoftext|>", "<|endoftext|>")
"""What the operators call the marks that they look up."""


def check(tokenizer: Tokenizer) -> None:
    """PocketclipError for a tokenizer that no operator knows."""
    kind = json.loads(tokenizer.tokenizer.to_str())["model"]["type"]
    contract = tokenizer.contract
    if kind != "BPE" or contract.start_id is None:
        raise PocketclipError(
            "texts: onnxruntime-extensions takes byte-level pairs with a start and an end mark; "
            f"this tokenizer is {kind}" + ("" if contract.start_id else " and adds its own marks")
        )


def attach_(model: Any, tokenizer: Tokenizer, tokens: str) -> None:
    """Let a text tower take strings [1], in place."""
    from onnx import TensorProto

    check(tokenizer)
    part = _graph.Part(PREFIX)
    _ids(part, tokenizer, tokens)
    _graph.attach_(model, part, NAME, TensorProto.STRING, [1])


def _ids(part: _graph.Part, tokenizer: Tokenizer, out: str) -> None:
    from onnx import TensorProto

    add, constant, contract = part.add, part.constant, tokenizer.contract
    assert contract.start_id is not None
    raw = _raw(part, tokenizer)  # [1, n]
    none, axis = constant([0], "int64"), constant([1], "int64")
    kept = add("Slice", raw, none, constant([contract.context_length - 2], "int64"), axis)
    marks = (constant([[mark]], "int64") for mark in (contract.start_id, contract.end_id))
    start, end = marks
    whole = add("Concat", start, kept, end, axis=1)
    length = add("Shape", whole, start=1, end=2)
    missing = add("Sub", constant([contract.context_length], "int64"), length)
    pads = add("Concat", constant([0, 0, 0], "int64"), missing, axis=0)
    filled = add("Pad", whole, pads, constant(contract.pad_id, "int64"))
    shape = constant([1, contract.context_length], "int64")
    add("Cast", add("Reshape", filled, shape), to=TensorProto.INT32, out=out)


def _raw(part: _graph.Part, tokenizer: Tokenizer) -> str:
    """The ids of the text alone, int64 [1, n]."""
    file = json.loads(tokenizer.tokenizer.to_str())
    add, constant, contract = part.add, part.constant, tokenizer.contract
    text = _replaced(part, _replaced(part, NAME, r"\s+", " "), r"^ | $", "")
    if contract.lowercase or "Lowercase" in json.dumps(file["normalizer"]):
        text = add("StringLower", text, domain=_graph.CONTRIB)
    operator = OPERATORS[file["model"].get("end_of_word_suffix")]
    if '"add_prefix_space": true' in json.dumps(file["pre_tokenizer"]):
        text = add("StringConcat", _string(part, " "), text)
        text = _replaced(part, text, r"^ $", "")  # no text has no first word
    vocabulary = dict(file["model"]["vocab"])
    for mark, number in zip(MARKS, (contract.start_id, contract.end_id)):
        vocabulary[mark] = number
    merges = file["model"]["merges"]
    ids = add(
        operator,
        text,
        domain=_graph.CONTRIB,
        vocab=json.dumps(vocabulary, ensure_ascii=False),
        merges="\n".join(m if isinstance(m, str) else " ".join(m) for m in merges),
        padding_length=-1,
    )
    if operator == "GPT2Tokenizer":
        return ids
    # CLIP's operator adds both marks.
    one, last, axis = (constant([n], "int64") for n in (1, -1, 1))
    return add("Slice", ids, one, last, axis)


def _replaced(part: _graph.Part, text: str, pattern: str, instead: str) -> str:
    """A text with every match of a pattern replaced."""
    strings = _string(part, pattern), _string(part, instead)
    return part.add("StringRegexReplace", text, *strings, domain=_graph.CONTRIB, global_replace=1)


def _string(part: _graph.Part, value: str) -> str:
    from onnx import numpy_helper

    name = f"{part.prefix}/constant{len(part.constants)}"
    part.constants.append(numpy_helper.from_array(np.array([value], dtype=object), name))
    return name
