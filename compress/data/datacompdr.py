"""Reinforced shards in the layouts in which Apple publishes DataCompDR, read and written.

A tar whose members share a key K: K.npz (float32) or K.pth.gz (gzip of a torch file, bfloat16) with
the teachers' embeddings, K.paug.json, K.syn.json, K.json, and where the images have been joined,
K.jpg and K.txt. The teachers' vectors stand side by side in one row, each of unit length by itself.
"""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import atomic
from compress.data.shards import IMAGE_SUFFIXES, OPENERS, UNREADABLE, shard_key
from compress.errors import PocketclipError

IMAGES, TEXTS, SUFFIX = "image_emb", "text_emb", "_emb"
UNSOUND = (
    ValueError, KeyError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One reinforced sample."""

    key: str
    param_aug: list[Any]
    """One entry per stored augmentation, see `param_aug.py`; A of them."""
    images: Tensor
    """float32 [A, sum of the teachers' widths]."""
    texts: Tensor
    """float32 [number of original captions, same]."""
    synthetic: dict[str, Tensor]
    """Caption set -> float32 [S, same]."""
    synthetic_texts: dict[str, list[str]]
    """Caption set -> S captions."""
    image: bytes | None = None
    """The encoded picture; None in the published files, which hold none."""
    caption: str | None = None
    """The original caption; None in the published files."""
    about: dict[str, Any] = field(default_factory=dict)
    """K.json: uid, sha256 and whatever else."""


def split_teachers(vectors: Tensor, widths: Iterable[int]) -> list[Tensor]:
    """Each teacher's part of concatenated vectors [..., sum of widths] -> K of [..., width]."""
    widths = list(widths)
    if sum(widths) != vectors.shape[-1]:
        raise PocketclipError(
            f"vectors of width {vectors.shape[-1]} are not made of teachers of widths {widths}"
        )
    return list(vectors.split(widths, dim=-1))


def read_members(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Each sample's key and its members by suffix, in the order of the file."""
    try:
        with (
            OPENERS[path.suffix](path, "rb") as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            rows = (
                (*shard_key(m.name), extracted.read())
                for m in tar
                if m.isfile() and (extracted := tar.extractfile(m))
            )
            for key, members in groupby(rows, itemgetter(0)):
                yield key, {suffix: content for _, suffix, content in members}
    except (*UNREADABLE, KeyError) as error:
        raise PocketclipError(f"{path}: unreadable shard ({error}); download it again") from error


def read(path: Path) -> Iterator[Record]:
    """Every sample of a shard; PocketclipError names the sample and member that is wrong."""
    for key, members in read_members(path):
        try:
            yield parse(key, members)
        except PocketclipError as error:
            raise PocketclipError(f"{path}: {error}") from None


def parse(key: str, members: Mapping[str, bytes]) -> Record:
    """A sample's members -> the sample, whichever of the published layouts it is in."""
    arrays = _arrays(key, members)
    texts = {name: list(values) for name, values in _json(key, members, "syn.json").items()}
    about = _json(key, members, "json", required=False)
    entries = _json(key, members, "paug.json").get("param_aug")
    entries = json.loads(entries) if isinstance(entries, str) else entries
    if not isinstance(entries, list) or len(entries) != len(arrays[IMAGES]):
        raise PocketclipError(
            f"{key}.paug.json: {len(entries or ())} augmentations for "
            f"{len(arrays[IMAGES])} image embeddings"
        )
    own, synthetic = _captions(key, arrays, texts)
    return Record(
        key, entries, arrays[IMAGES], own, synthetic, texts,
        image=next((members[s] for s in members if s in IMAGE_SUFFIXES), None),
        caption=members["txt"].decode("utf-8", "replace").strip() if "txt" in members else None,
        about=about,
    )  # fmt: skip


def _arrays(key: str, members: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The embeddings as float32; K.npz counts where both are there. Nothing is unpickled."""
    try:
        if "npz" in members:
            with np.load(io.BytesIO(members["npz"]), allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        elif "pth.gz" in members:
            content = gzip.decompress(members["pth.gz"])
            found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        else:
            raise PocketclipError(f"{key}: neither {key}.npz nor {key}.pth.gz")
        found = {name: torch.as_tensor(value).float() for name, value in found.items()}
        found = {name: v[None] if v.ndim == 1 else v for name, v in found.items()}
        assert found[IMAGES].shape[1] == found[TEXTS].shape[1], "widths differ"
        return found
    except (*UNSOUND, AssertionError) as error:
        raise PocketclipError(f"{key}: unsound embeddings ({error})") from None


def _json(
    key: str, members: Mapping[str, bytes], suffix: str, required: bool = True
) -> dict[str, Any]:
    """A JSON member; published ones come as an object, or as a string that holds one."""
    if suffix not in members:
        if required:
            raise PocketclipError(f"{key}: no {key}.{suffix}")
        return {}
    try:
        value = json.loads(members[suffix])
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise PocketclipError(f"{key}.{suffix}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise PocketclipError(f"{key}.{suffix}: an object is needed, not {type(value).__name__}")
    return value


def _captions(
    key: str, arrays: dict[str, Tensor], texts: dict[str, list[str]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings of original and synthetic captions, of the new layout or the legacy one.

    New: `text_emb` holds the originals, `<set>_emb` each set. Legacy: row 0 of `text_emb` is the
    original and the rest are the one set's.
    """
    sets = {name: arrays[name + SUFFIX] for name in texts if name + SUFFIX in arrays}
    originals = arrays[TEXTS]
    if not sets and len(texts) == 1:
        [name] = texts
        num = len(texts[name])
        if len(originals) != 1 + num:
            raise PocketclipError(
                f"{key}: text_emb has {len(originals)} rows for 1 + {num} captions (legacy layout)"
            )
        return originals[:1], {name: originals[1:]}
    for name, values in sets.items():
        if len(values) != len(texts[name]):
            raise PocketclipError(
                f"{key}: {name}{SUFFIX} has {len(values)} rows for {len(texts[name])} captions"
            )
    return originals, sets


def write(path: Path, records: Iterable[Record], bfloat16: bool, legacy: bool = False) -> int:
    """Write a shard -> number of samples. bfloat16: K.pth.gz in place of K.npz; legacy: all
    captions' embeddings in `text_emb`.
    """
    count = 0
    with atomic.file(path) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for record in records:
            count += 1
            for suffix, content in _members(record, bfloat16, legacy).items():
                info = tarfile.TarInfo(f"{record.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return count


def _members(record: Record, bfloat16: bool, legacy: bool) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    if record.image is not None:
        members["jpg"] = record.image
    if record.caption is not None:
        members["txt"] = record.caption.encode()
    arrays = {IMAGES: record.images, TEXTS: record.texts}
    if legacy:
        arrays[TEXTS] = torch.cat([record.texts[:1], *record.synthetic.values()])
    else:
        arrays |= {name + SUFFIX: values for name, values in record.synthetic.items()}
    buffer = io.BytesIO()
    if bfloat16:
        torch.save({name: v.bfloat16().clone() for name, v in arrays.items()}, buffer)
        members["pth.gz"] = gzip.compress(buffer.getvalue(), mtime=0)
    else:
        plain: dict[str, NDArray[Any]] = {name: v.float().numpy() for name, v in arrays.items()}
        np.savez(buffer, allow_pickle=False, **plain)
        members["npz"] = buffer.getvalue()
    about = {"syn.json": record.synthetic_texts, "paug.json": {"param_aug": record.param_aug}}
    for suffix, value in {**about, "json": record.about}.items():
        members[suffix] = json.dumps(value).encode()
    return members
