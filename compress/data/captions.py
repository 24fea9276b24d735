"""Synthetic captions of a data set: the pairs' own further ones, a file's, or a captioner's."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.data.captioner import draw, open_captioner, words
from compress.data.pairs import Pairs
from compress.errors import PocketclipError
from compress.preprocess import flatten

BATCH = 32


class Captions(BaseModel):
    """Where the synthetic captions of a reinforced store come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["none", "own", "file", "coca"] = "none"
    """none: all captions are originals. own: those after a pair's first are the synthetic ones.
    file: `file`, for rewrites made elsewhere (LaCLIP) or labels. coca: open_clip's captioner."""
    file: Path | None = None
    """JSON object (key -> list of captions), or JSON lines of {"key": ..., "captions": [...]}."""
    model: str = "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k"
    """Name and pretrained weights of the captioner for `coca`."""
    num: int = Field(default=5, ge=1)
    """At most so many synthetic captions of each image."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Nucleus sampling of `coca`."""

    def identity(self) -> dict[str, Any]:
        """What the captions depend on; a file by its content."""
        about = self.model_dump(mode="json", exclude={"file"})
        if self.file is not None:
            about["file"] = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return about


def captions_of(
    cfg: Captions, pairs: Pairs, indices: Sequence[int], seed: int = 0, device: str = "cpu"
) -> list[tuple[list[str], list[str]]]:
    """(original captions, synthetic captions) of each pair; `seed` is for what is drawn."""
    own = [pairs.captions[index] for index in indices]
    if cfg.source == "none":
        return [(captions, []) for captions in own]
    if cfg.source == "own":
        return [(captions[:1], captions[1 : 1 + cfg.num]) for captions in own]
    if cfg.source == "file":
        if cfg.file is None:
            raise PocketclipError("reinforce.captions.file: `source: file` needs the file's path")
        found = _read(cfg.file, cfg.file.stat().st_mtime_ns)
        keys = [pairs.keys[index] for index in indices]
        missing = [key for key in keys if not found.get(key)]
        if missing:
            raise PocketclipError(
                f"{cfg.file}: no captions for {missing[0]} and {len(missing) - 1} more samples"
            )
        return [(captions, found[key][: cfg.num]) for captions, key in zip(own, keys)]
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return list(zip(own, _generate(cfg, pairs, indices, device)))


@lru_cache(maxsize=2)
def _read(path: Path, changed: int) -> dict[str, list[str]]:
    """Captions by key; `changed`, the time of the last change, makes a new file be read anew."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = json.loads(text).items()
        else:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            rows = [(line["key"], line["captions"]) for line in lines]
        found = {str(key): list(map(str, captions)) for key, captions in rows}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PocketclipError(
            f"{path}: not a caption file ({error}); give a JSON object of key -> captions, or JSON "
            'lines of {"key", "captions"}'
        ) from None
    return found


def _generate(cfg: Captions, pairs: Pairs, indices: Sequence[int], device: str) -> list[list[str]]:
    """DataCompDR's way: nucleus sampling, cut at the first full stop; empty ones are left out."""
    model, transform = open_captioner(cfg.model, device)
    found: list[list[str]] = []
    for start in range(0, len(indices), BATCH):
        pictures = [
            flatten(pairs.image(i), (255, 255, 255)) for i in indices[start : start + BATCH]
        ]
        pixels = torch.stack([transform(picture) for picture in pictures]).to(device)
        for tokens in draw(model, pixels, cfg.num, cfg.top_p).cpu():
            found.append(list(dict.fromkeys(filter(None, map(words, tokens)))))
    return found
