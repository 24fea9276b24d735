"""Less to compute and to store, the same embeddings: passes that lose nothing.

Put it last: a stage that changes weights drops the class matrix.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.batches import embed_names
from compress.clip import Classes, Clip, build
from compress.errors import PocketclipError
from compress.structure import ClipConfig, TextConfig, VisionConfig
from compress.vocabulary import trim
from compress.work import Data, Work

VERSION = 1

# Lengths that suit every runtime's matrix products.
MULTIPLE = 8


class Config(BaseModel):
    """Settings of the exact stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    last_block: bool = True
    """Compute the last block of each tower for the pooled token alone: a twelfth of the
    multiply-adds of a 12-layer tower."""
    context: Literal["keep", "data"] | int = "data"
    """Tokens of a text: those of the longest prompt or training caption, or a number. Exact for
    texts up to this length; longer ones are cut here instead of later. Causal towers only."""
    classes: bool = True
    """Fold the prompts of `data.classes` into a class matrix that goes into every bundle."""
    vocabulary: Literal["keep", "data"] = "keep"
    """Tokens to keep: all, or those of the prompts and training captions. Other words still
    tokenize, into shorter pieces."""
    vocabulary_file: Path | None = None
    """A text per line whose tokens are kept too, such as a language's words."""
    patch_as: Literal["conv", "matmul"] | None = None
    """Projection of the patches as a convolution or as a matrix product; null leaves it. ONNX
    Runtime's int8 files always hold the product."""
    min_context: int = Field(default=8, ge=3)
    """Never fewer tokens of a text than this."""


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Apply what fits this model; a pass that doesn't is left out."""
    clip = pooled_last(work.clip) if cfg.last_block else work.clip
    if cfg.patch_as is not None and isinstance(clip.model.config.vision, VisionConfig):
        clip = restructured(clip, vision={"patch_as": cfg.patch_as})
    if isinstance(clip.model.config.text, TextConfig):
        if cfg.vocabulary == "data" or cfg.vocabulary_file is not None:
            clip = trimmed(clip, _corpus(work.data, cfg))
        clip = _shorter(clip, work.data, cfg)
    step = {"step": "exact", "settings": cfg.model_dump(mode="json")}
    clip = clip.with_model(clip.model, step)
    if cfg.classes and work.data.classes_file is not None:
        clip = replace(clip, classes=class_matrix(clip, work.data))
    return replace(work, clip=clip)


def pooled_last(clip: Clip) -> Clip:
    """Both last blocks for the pooled token alone, where a tower pools one."""
    vision, text = clip.model.config.vision, clip.model.config.text
    if isinstance(vision, VisionConfig) and vision.pooling == "class" and not vision.post_norm:
        clip = restructured(clip, vision={"last_block": "pooled"})
    if isinstance(text, TextConfig) and _ends_causally(text):
        clip = restructured(clip, text={"last_block": "pooled"})
    return clip


def with_context(clip: Clip, length: int) -> Clip:
    """The model for texts of at most `length` tokens, marks included."""
    text = clip.model.config.text
    if not (isinstance(text, TextConfig) and _ends_causally(text)):
        raise PocketclipError(
            "exact.context: this text tower sees what follows a text's end (it isn't causal), so a "
            "shorter context would change its embeddings; set it to keep"
        )
    if not 3 <= length <= text.context_length:
        raise PocketclipError(
            f"exact.context: {length} tokens; it must lie between 3 and {text.context_length}"
        )
    state = clip.model.state_dict()
    state["text.position"] = state["text.position"][:length].clone()
    contract = clip.tokenizer.contract.model_copy(update={"context_length": length})
    tokenizer = type(clip.tokenizer)(clip.tokenizer.tokenizer, contract)
    clip = replace(clip, tokenizer=tokenizer)
    return restructured(clip, state, text={"context_length": length})


def trimmed(clip: Clip, texts: Sequence[str]) -> Clip:
    """The model with only the tokens that `texts` and unknown words need."""
    tokenizer, kept = trim(clip.tokenizer, texts)
    text = clip.model.config.text
    assert isinstance(text, TextConfig)
    place = {old: new for new, old in enumerate(kept)}
    change: dict[str, Any] = {"vocab_size": len(kept)}
    if text.pooling == "end":
        change["end_id"] = place[text.end_id]
    if text.pad_id is not None:
        change["pad_id"] = place[text.pad_id]
    state = clip.model.state_dict()
    state["text.token.weight"] = state["text.token.weight"][torch.tensor(kept)].clone()
    return restructured(replace(clip, tokenizer=tokenizer), state, text=change)


def class_matrix(clip: Clip, data: Data) -> Classes:
    """The recipe's classes, each as the mean of its prompts' embeddings, of unit length."""
    names = [name for _, name in data.classes]
    return Classes(tuple(names), embed_names(clip, names, list(data.templates)).cpu())


def restructured(
    clip: Clip,
    state: dict[str, Tensor] | None = None,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> Clip:
    """The same weights (or `state`) in a structure with these fields changed."""
    config = clip.model.config
    changed = config.model_dump()
    changed["vision"] |= vision or {}
    changed["text"] |= text or {}
    new = ClipConfig.model_validate(changed)
    return replace(clip, model=build(new, state or clip.model.state_dict(), "exact"))


def _ends_causally(text: TextConfig) -> bool:
    """Whether nothing after the end of a text has a say in its embedding."""
    plain = not (text.post_norm or text.class_token or text.pad_id is not None)
    return text.causal and text.pooling in ("argmax", "end") and plain


def _shorter(clip: Clip, data: Data, cfg: Config) -> Clip:
    text = clip.model.config.text
    assert isinstance(text, TextConfig)
    if isinstance(cfg.context, int):
        return with_context(clip, cfg.context)
    texts = _texts(data)
    if cfg.context == "keep" or not _ends_causally(text) or not texts:
        return clip
    end = clip.tokenizer.contract.end_id
    tokens = clip.tokenizer(texts)  # [texts, L]
    longest = int((tokens == end).int().argmax(dim=1).max()) + 1
    length = max(cfg.min_context, -(-longest // MULTIPLE) * MULTIPLE)
    return with_context(clip, min(length, text.context_length))


def _texts(data: Data) -> list[str]:
    """Every class prompt and every training caption; what is only measured on has no say."""
    names = [name for _, name in data.classes] if data.classes_file else []
    prompts = [template.format(name) for name in names for template in data.templates]
    own = data.train and data.captions == "own"
    captions = [c for row in data.pairs.captions for c in row] if own else []
    return list(dict.fromkeys([*prompts, *captions]))


def _corpus(data: Data, cfg: Config) -> list[str]:
    """The texts whose tokens stay."""
    texts = _texts(data) if cfg.vocabulary == "data" else []
    if cfg.vocabulary_file is not None:
        texts += cfg.vocabulary_file.read_text(encoding="utf-8").splitlines()
    if not texts:
        raise PocketclipError(
            "exact.vocabulary: data, but the recipe has neither classes nor training captions"
        )
    return texts
