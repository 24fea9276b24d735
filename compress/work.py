"""What flows from stage to stage: the model so far, the model it came from, and the data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.data.stand_ins import SENTENCES
from compress.errors import PocketclipError

if TYPE_CHECKING:
    from compress.clip import Clip
    from compress.data.pairs import Pairs


NUM_STAND_INS = 8
"""Texts that stand for the captions of each picture."""


@dataclass(frozen=True)
class Data:
    """Shards of a recipe, decoded on first use and kept for the following stages.

    `evaluate` splits are for measuring only: no stage may let them shape the weights, which is why
    `digest`, the part of a stage's resume key, leaves them out.
    """

    train: Sequence[Path] = ()
    evaluate: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    classes_file: Path | None = None
    templates: Sequence[str] = ("{}",)
    image_size: int | None = None
    """Pixels a side of the training images in memory; None until a model says what it takes."""
    template_captions: bool = False
    """Whether training pairs also have their name in every template as captions."""
    captions: Literal["own", "none"] = "own"
    """none: training pictures come alone, and `stand_ins` are the texts that towers are calibrated
    with."""

    @cached_property
    def pairs(self) -> "Pairs":
        """The training pairs, images at `image_size` pixels a side."""
        if not self.train:
            raise PocketclipError("data.train: this recipe names no shards, but a stage needs them")
        from compress.data.pairs import load_pairs

        assert self.image_size is not None, "sized_for() comes before the training pairs"
        alone = self.captions == "none"
        pairs = load_pairs(self.train, self.image_size, needs_caption=not alone)
        if alone:
            texts = self.stand_ins
            return replace(
                pairs,
                captions=[
                    [texts[(n + k) % len(texts)] for k in range(min(NUM_STAND_INS, len(texts)))]
                    for n in range(len(pairs))
                ],
            )
        if not self.template_captions:
            return pairs
        captions = [
            list(dict.fromkeys([*own, *(template.format(name) for template in self.templates)]))
            for own, name in zip(pairs.captions, pairs.names, strict=True)
        ]
        return replace(pairs, captions=captions)

    @cached_property
    def stand_ins(self) -> list[str]:
        """Texts in place of captions that aren't there: the prompts, or sentences of our own. They
        say nothing of the picture that they are given to.
        """
        if self.classes_file is None:
            return list(SENTENCES)
        names = [name for _, name in self.classes]
        return [template.format(name) for name in names for template in self.templates]

    def sized_for(self, clip: "Clip") -> "Data":
        """The same data, its training images as large as the model takes unless already said."""
        return self if self.image_size else replace(self, image_size=max(clip.preprocess.size))

    def prompted(self) -> "Data":
        """The same data with `template_captions`."""
        return replace(self, template_captions=True)

    @cached_property
    def _splits(self) -> dict[str, "Pairs"]:
        return {}

    def split(self, name: str) -> "Pairs":
        """The pairs of an evaluation split, by its name in the recipe's `data.evaluate`; its
        pictures at their own sizes, so that each model's preprocessing sees whole ones.
        """
        from compress.data.pairs import load_split

        if name not in self.evaluate:
            known = ", ".join(self.evaluate) or "none"
            raise PocketclipError(f"data.evaluate.{name}: no such split (the recipe has: {known})")
        if name not in self._splits:
            self._splits[name] = load_split(self.evaluate[name])
        return self._splits[name]

    @cached_property
    def classes(self) -> list[tuple[str, str]]:
        """Zero-shot classes as (concept, English name), in the order of the class file."""
        if self.classes_file is None:
            raise PocketclipError("data.classes: zero-shot accuracy needs a list of classes")
        return [(row["concept"], row["name"]) for row in read_classes(self.classes_file)]

    @cached_property
    def digest(self) -> str:
        """sha256 of all that a stage may learn from."""
        words = [*self.templates, *(["template captions"] if self.template_captions else [])]
        words += ["no captions"] if self.captions == "none" else []
        size = "" if self.image_size is None else str(self.image_size)
        return _digest(self.train, self.classes_file, [size, *words])

    @cached_property
    def evaluation_digest(self) -> str:
        """sha256 of all that an accuracy figure depends on."""
        shards = [path for name in sorted(self.evaluate) for path in self.evaluate[name]]
        names = [f"{name}:{len(self.evaluate[name])}" for name in sorted(self.evaluate)]
        return _digest(shards, self.classes_file, [*self.templates, *names])


@dataclass(frozen=True)
class Work:
    """What a stage gets and gives back; it replaces `clip` and leaves the rest."""

    clip: "Clip"
    """The model as the stages so far have made it."""
    teacher: "Clip"
    """The recipe's `model`, untouched."""
    data: Data
    device: str = "cpu"
    """Where training runs: a torch device name."""
    seed: int = 0
    """Already given to torch, numpy and random when a stage starts; for generators of its own."""
    store: Path | None = None
    """The reinforced store that an earlier stage of this run has made."""


def read_classes(path: Path) -> list[dict[str, str]]:
    """Read a class file: a JSON list of objects with at least `concept` and `name`.

    Raises PocketclipError naming the file and the entry that is wrong.
    """
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PocketclipError(f"{path}: not a readable JSON class file ({error})") from error
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not {"concept", "name"} <= set(row):
            raise PocketclipError(f"{path}[{index}]: each class needs 'concept' and 'name'")
    return rows


def _digest(shards: Sequence[Path], classes: Path | None, words: Sequence[str]) -> str:
    from compress.data.shards import digest

    parts = [digest(shards) if shards else "", *words]
    if classes is not None:
        parts.append(hashlib.sha256(classes.read_bytes()).hexdigest())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
