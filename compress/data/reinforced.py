"""Our reinforced store: several teachers' embeddings of augmented images and of captions.

    STORE/store.json         identity: whose embeddings, of which data, how augmented
    STORE/00000.safetensors  images.K [n, V, E_K] and texts.K [t, E_K] bfloat16 for each teacher K,
                             parameters [n, V, P] float32 (or none: then crops stand in the JSON)
    STORE/00000.json         sha256 of the above, and for each sample its key and captions

Nothing is pickled. A shard's JSON is written last: a shard without one is made again. Tensors are
memory-mapped.

Shapes: n samples and t captions of a shard, V views, P augmentation parameters, E embedding.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from compress import atomic
from compress.data.param_aug import Entry
from compress.errors import PocketclipError

SCHEMA_VERSION = 1
INDEX = "store.json"


class Teacher(BaseModel):
    """Who embedded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Its name, for messages."""
    fingerprint: str
    """sha256 of weights and preprocessing."""
    tokenizer: str
    """sha256 of its tokenizer and contract."""
    embed_dim: int
    """Width of its embeddings."""
    logit_scale: float
    """The scale it has learnt."""
    logit_bias: float = 0.0
    """The bias it has learnt, where it has one."""


class Identity(BaseModel):
    """All that the numbers of a store depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teachers: tuple[Teacher, ...]
    """In the order of the tensors."""
    data: str
    """Digest of the images and captions."""
    transform: dict[str, Any]
    """How images are augmented: the kind and its settings."""
    views: int
    """Augmentations of each image."""
    captions: dict[str, Any]
    """Where the synthetic captions are from."""
    seed: int
    """Start of the random numbers."""
    num_shards: int
    """How many shards make the store whole."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Sample(BaseModel):
    """One image in a shard; its rows of `texts` are the captions, then the synthetic ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """The sample's key in its data set."""
    captions: list[str]
    """Original captions."""
    synthetic: list[str] = []
    """Generated or rewritten captions."""
    crops: list[Entry] | None = None
    """Photo augmentations, see `param_aug.py`; None where `parameters` has them."""

    @property
    def num_texts(self) -> int:
        return len(self.captions) + len(self.synthetic)


@dataclass(frozen=True)
class Shard:
    """One finished shard."""

    path: Path
    samples: list[Sample]
    sha256: str

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Memory-mapped, after one check of the file's digest."""
        if atomic.sha256(self.path) != self.sha256:
            raise PocketclipError(
                f"{self.path}: damaged (its sha256 differs); remove {self.path} "
                f"and {self.path.with_suffix('.json').name}, and reinforce again"
            )
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise PocketclipError(f"{self.path}: damaged store ({error})") from None

    @cached_property
    def first_text(self) -> list[int]:
        """Row of `texts` at which each sample's captions begin."""
        starts, total = [], 0
        for sample in self.samples:
            starts.append(total)
            total += sample.num_texts
        return starts


def write_shard(
    folder: Path, number: int, digest: str, samples: Sequence[Sample], tensors: dict[str, Tensor]
) -> None:
    """Write a shard, its JSON last. `digest` is that of the store's identity."""
    path = folder / f"{number:05d}.safetensors"
    content = serialise({name: tensor.contiguous() for name, tensor in tensors.items()})
    atomic.write_bytes(path, content)
    about = {
        "schema_version": SCHEMA_VERSION,
        "identity": digest,
        "sha256": hashlib.sha256(content).hexdigest(),
        "samples": [sample.model_dump() for sample in samples],
    }
    atomic.write_json(path.with_suffix(".json"), about)


def read_shard(folder: Path, number: int, digest: str) -> Shard | None:
    """A finished shard; None where there is none. One of another store is refused."""
    path = folder / f"{number:05d}.json"
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        samples = [Sample.model_validate(sample) for sample in about["samples"]]
        found = about["identity"]
        shard = Shard(path.with_suffix(".safetensors"), samples, about["sha256"])
    except (ValueError, KeyError, ValidationError) as error:
        raise PocketclipError(f"{path}: damaged ({error}); remove it to make it again") from None
    if found != digest:
        raise PocketclipError(f"{path}: belongs to another store than {folder / INDEX}; remove it")
    if not shard.path.exists():
        return None
    return shard


def begin(folder: Path, identity: Identity) -> None:
    """Write store.json, or check that the one there says the same."""
    path = folder / INDEX
    if not path.exists():
        about = {"schema_version": SCHEMA_VERSION, **identity.model_dump(mode="json")}
        atomic.write_json(path, about)
        return
    found = read_identity(folder)
    if found != identity:
        different = ", ".join(differences(identity, found))
        raise PocketclipError(f"{path} was made with another {different}; choose another folder")


def read_identity(folder: Path) -> Identity:
    """What store.json says."""
    path = folder / INDEX
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise PocketclipError(f"{path}: schema {version}, this version reads {SCHEMA_VERSION}")
        return Identity.model_validate(about)
    except FileNotFoundError:
        raise PocketclipError(f"{path}: no such file; the reinforce stage makes a store") from None
    except (ValueError, KeyError, ValidationError) as error:
        raise PocketclipError(f"{path}: not a store ({error})") from None


def differences(wanted: Identity, found: Identity) -> list[str]:
    """Names of what differs, in words of a recipe."""
    pairs = ((name, getattr(wanted, name), getattr(found, name)) for name in Identity.model_fields)
    return [name for name, ours, theirs in pairs if ours != theirs]


@dataclass(frozen=True)
class Store:
    """A finished store, each sample by its key."""

    folder: Path
    identity: Identity
    shards: list[Shard]

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Key -> (shard, row)."""
        return {
            sample.key: (n, row)
            for n, shard in enumerate(self.shards)
            for row, sample in enumerate(shard.samples)
        }

    def sample(self, key: str) -> Sample:
        number, row = self.places[key]
        return self.shards[number].samples[row]

    def parameters(self, keys: Sequence[str], views: Tensor) -> Tensor:
        """Augmentation parameters [B, P] of one view of each sample."""
        return self._rows("parameters", keys, views)

    def images(self, teacher: int, keys: Sequence[str], views: Tensor) -> Tensor:
        """A teacher's embeddings of those views: float32 [B, E]."""
        return self._rows(f"images.{teacher}", keys, views).float()

    def texts(self, teacher: int, keys: Sequence[str], which: Sequence[int]) -> Tensor:
        """A teacher's embeddings of one caption of each sample, counted over the captions and then
        the synthetic ones: float32 [B, E].
        """
        found = []
        for key, caption in zip(keys, which, strict=True):
            number, row = self.places[key]
            shard = self.shards[number]
            found.append(shard.tensors[f"texts.{teacher}"][shard.first_text[row] + caption])
        return torch.stack(found).float()

    def _rows(self, name: str, keys: Sequence[str], views: Tensor) -> Tensor:
        found = []
        for key, view in zip(keys, views.tolist(), strict=True):
            number, row = self.places[key]
            found.append(self.shards[number].tensors[name][row, view])
        return torch.stack(found)


def open_store(folder: Path) -> Store:
    """Open a finished store; PocketclipError names the shards that are missing."""
    identity = read_identity(folder)
    found = [read_shard(folder, n, identity.digest) for n in range(identity.num_shards)]
    missing = [str(n) for n, shard in enumerate(found) if shard is None]
    if missing:
        raise PocketclipError(
            f"{folder}: {len(missing)} of {identity.num_shards} shards are missing "
            f"({', '.join(missing[:5])}): run the reinforce stage again, it goes on there"
        )
    return Store(folder, identity, [shard for shard in found if shard is not None])
