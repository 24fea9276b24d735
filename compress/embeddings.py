"""From an encoder and a split to unit vectors of its images, captions and classes.

Torch models and exported files are both encoders (`encode_image`, `encode_text`), so the figures
that `evaluate.py` draws from these arrays come from the same code for both.

N images, M captions, C classes, T templates, E embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from compress.errors import PocketclipError
from compress.scores import Booleans, Floats, Integers

if TYPE_CHECKING:
    from compress.clip import Encoder
    from compress.work import Data


class Config(BaseModel):
    """The `evaluate:` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    headline: str | None = None
    """The split whose figures lead the report; by default the first one listed in the recipe."""
    splits: tuple[str, ...] | None = None
    """The splits to measure; by default every one listed under `data.evaluate`."""
    num_images: int | None = Field(default=None, ge=1)
    """At most this many images of each split, drawn once with `seed`; by default all of them."""
    captions_per_image: int = Field(default=5, ge=1)
    """Only the first so many captions of each image take part in retrieval."""
    batch_size: int = Field(default=64, ge=1)
    """Images or texts handed to the encoder at once; it changes speed and memory, not figures."""
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples behind each 95 % interval."""
    seed: int = 0
    """Draws `num_images` and the bootstrap resamples."""


class Contracts(Protocol):
    """What turns pictures and sentences into tensors: a `Clip` has both, and so has a bundle."""

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]: ...

    @property
    def tokenizer(self) -> Callable[[list[str]], Tensor]: ...


@dataclass(frozen=True)
class Split:
    """The questions a split asks, without any encoder: which texts are right for which images."""

    name: str
    indices: Integers  # [N] positions in the split's pairs
    captions: list[str]  # [M] distinct
    groups: Integers  # [N] images with the same group share their correct captions
    caption_groups: Booleans  # [M, number of groups]
    class_names: list[str]  # [C], empty without classes
    labels: Integers  # [N] class index, -1 for an image that is no class


@dataclass(frozen=True)
class Embeddings:
    """One encoder's unit vectors on one split."""

    split: Split
    images: Floats  # [N, E]
    captions: Floats  # [M, E]
    classes: Floats  # [C, E]


def headline_split(data: "Data", cfg: Config) -> str:
    """The name of the split that leads. Raises PocketclipError for a name the data lacks."""
    return _known(cfg.headline, data) if cfg.headline else split_names(data, cfg)[0]


def split_names(data: "Data", cfg: Config) -> list[str]:
    """The splits to measure, in the recipe's order, the headline among them."""
    if not data.evaluate:
        raise PocketclipError("data.evaluate lists no split, so there is nothing to measure on")
    names = [_known(name, data) for name in cfg.splits or data.evaluate]
    if cfg.headline and cfg.headline not in names:
        names.append(_known(cfg.headline, data))
    return names


def _known(name: str, data: "Data") -> str:
    if name not in data.evaluate:
        raise PocketclipError(
            f"evaluate: no split named '{name}'; data.evaluate has {', '.join(data.evaluate)}"
        )
    return name


def read_split(data: "Data", name: str, cfg: Config) -> Split:
    """Lay out which captions and class each image of a split belongs to. Reads no pixels."""
    pairs = data.split(name)
    indices = _chosen(len(pairs.captions), cfg)
    concepts = [pairs.concepts[i] if pairs.concepts else "" for i in indices]
    # An image without a concept is a group of its own: only its own captions are right for it.
    keys = [concept or f"image {i}" for concept, i in zip(concepts, indices)]
    group_of = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    owners: dict[str, set[int]] = {}
    for key, i in zip(keys, indices):
        if not pairs.captions[i]:
            raise PocketclipError(f"split '{name}': image {i} has no caption")
        for caption in pairs.captions[i][: cfg.captions_per_image]:
            owners.setdefault(caption, set()).add(group_of[key])
    caption_groups = np.zeros((len(owners), len(group_of)), dtype=np.bool_)
    for row, members in enumerate(owners.values()):
        caption_groups[row, list(members)] = True
    groups = np.array([group_of[key] for key in keys], dtype=np.int64)
    class_names, labels = _labels(data, name, concepts)
    return Split(name, indices, list(owners), groups, caption_groups, class_names, labels)


def _chosen(num_images: int, cfg: Config) -> Integers:
    if num_images == 0:
        raise PocketclipError("a split to evaluate on holds no images")
    if cfg.num_images is None or cfg.num_images >= num_images:
        return np.arange(num_images)
    random = np.random.default_rng(cfg.seed)
    return np.sort(random.choice(num_images, cfg.num_images, replace=False))


def _labels(data: "Data", name: str, concepts: list[str]) -> tuple[list[str], Integers]:
    classes = data.classes if data.classes_file else []
    position = {concept: n for n, (concept, _) in enumerate(classes)}
    if not classes or not any(concepts):
        return [], np.full(len(concepts), -1, dtype=np.int64)
    unknown = next((c for c in concepts if c and c not in position), None)
    if unknown:
        raise PocketclipError(f"split '{name}': concept '{unknown}' is not in the class list")
    labels = [position[c] if c else -1 for c in concepts]
    return [text for _, text in classes], np.array(labels, dtype=np.int64)


def embed(
    encoder: "Encoder",
    clip: Contracts,
    data: "Data",
    cfg: Config,
    splits: Sequence[str] | None = None,
    title: str = "evaluate",
    progress: bool = True,
) -> dict[str, Embeddings]:
    """Encode the splits (by default all that `cfg` asks for), texts that they share only once.

    `clip` brings the preprocessing and the tokenizer. Raises PocketclipError where an embedding is
    not finite or zero, naming the split and the image or the text.
    """
    read = [read_split(data, name, cfg) for name in splits or split_names(data, cfg)]
    templates = data.templates
    class_names = next((split.class_names for split in read if split.class_names), [])
    prompts = [template.format(name) for name in class_names for template in templates]
    texts = list(dict.fromkeys([*prompts, *(c for split in read for c in split.captions)]))
    console = Console(stderr=True)
    hidden = not progress or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as bar:
        total = len(texts) + sum(len(split.indices) for split in read)
        task = bar.add_task(title, total=total)

        def step(count: int) -> None:
            bar.advance(task, count)

        text_vectors = _encode_texts(encoder, clip, texts, cfg, step)  # [texts, E]
        place = {text: n for n, text in enumerate(texts)}
        classes = _class_vectors(text_vectors, [place[p] for p in prompts], len(templates))
        result = {}
        for split in read:
            images = _encode_images(encoder, clip, data, split, cfg, step)
            captions = text_vectors[[place[c] for c in split.captions]]
            own = classes if split.class_names else classes[:0]
            result[split.name] = Embeddings(split, images, captions, own)
    return result


def _class_vectors(texts: Floats, rows: list[int], num_templates: int) -> Floats:
    """The mean of each class's unit template vectors, made unit again: [C, E]."""
    if not rows:
        return texts[:0]
    per_template = texts[rows].reshape(-1, num_templates, texts.shape[1])  # [C, T, E]
    return _unit(per_template.mean(axis=1), [f"class {i}" for i in range(len(per_template))])


def _encode_texts(
    encoder: "Encoder", clip: Contracts, texts: list[str], cfg: Config, step: Callable[[int], None]
) -> Floats:
    parts = []
    for start in range(0, len(texts), cfg.batch_size):
        batch = texts[start : start + cfg.batch_size]
        with torch.inference_mode():
            vectors = encoder.encode_text(clip.tokenizer(batch))
        parts.append(_unit(_array(vectors), [f"the text {text!r}" for text in batch]))
        step(len(batch))
    return np.concatenate(parts)


def _encode_images(
    encoder: "Encoder",
    clip: Contracts,
    data: "Data",
    split: Split,
    cfg: Config,
    step: Callable[[int], None],
) -> Floats:
    pairs = data.split(split.name)
    parts = []
    for start in range(0, len(split.indices), cfg.batch_size):
        batch = split.indices[start : start + cfg.batch_size]
        pixels = torch.stack([clip.preprocess(pairs.image(int(i))) for i in batch])
        with torch.inference_mode():
            vectors = encoder.encode_image(pixels)
        names = [f"image {i} of split '{split.name}'" for i in batch]
        parts.append(_unit(_array(vectors), names))
        step(len(batch))
    return np.concatenate(parts)


def _array(vectors: Tensor) -> Floats:
    return vectors.detach().to("cpu", torch.float32).numpy()


def _unit(vectors: Floats, names: list[str]) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0)
    if bad.any():
        first = int(bad.argmax())
        state = "zero" if lengths[first, 0] == 0 else "not finite"
        raise PocketclipError(
            f"the embedding of {names[first]} is {state}: the model is broken, so no accuracy is "
            "reported (check the weights and the precision of this artifact)"
        )
    return vectors / lengths
