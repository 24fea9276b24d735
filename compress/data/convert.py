"""Our reinforced store written in Apple's layout."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from compress.data import datacompdr
from compress.data.datacompdr import Record
from compress.data.pairs import Pairs
from compress.data.reinforced import Sample, Shard, Store
from compress.errors import PocketclipError
from compress.preprocess import flatten

SYNTHETIC = "syn_text"


def to_datacompdr(store: Store, pairs: Pairs, folder: Path, bfloat16: bool) -> None:
    """Write each shard as a tar, images and captions joined in."""
    index = {key: n for n, key in enumerate(pairs.keys)}
    for number, shard in enumerate(store.shards):
        records = _records(store, shard, pairs, index)
        datacompdr.write(folder / f"{number:05d}.tar", records, bfloat16)


def _records(store: Store, shard: Shard, pairs: Pairs, index: dict[str, int]) -> Iterator[Record]:
    num = range(len(store.identity.teachers))
    images = torch.cat([shard.tensors[f"images.{k}"].float() for k in num], dim=-1)
    texts = torch.cat([shard.tensors[f"texts.{k}"].float() for k in num], dim=-1)
    for row, sample in enumerate(shard.samples):
        first = shard.first_text[row]
        rows = texts[first : first + sample.num_texts]
        yield _record(sample, images[row], rows, _jpeg(pairs, index[sample.key]))


def _record(sample: Sample, images: Tensor, texts: Tensor, jpeg: bytes) -> Record:
    if sample.crops is None:
        raise PocketclipError(
            "reinforce.datacompdr: Apple's layout stores crops and RandAugment; set `crops: {}`"
        )
    num = len(sample.captions)
    return Record(
        sample.key.replace("/", "_").replace(".", "_"),
        sample.crops,
        images,
        texts[:num],
        {SYNTHETIC: texts[num:]} if sample.synthetic else {},
        {SYNTHETIC: sample.synthetic} if sample.synthetic else {},
        image=jpeg,
        caption=sample.captions[0],
        about={"uid": sample.key, "sha256": hashlib.sha256(jpeg).hexdigest()},
    )


def _jpeg(pairs: Pairs, index: int) -> bytes:
    buffer = io.BytesIO()
    flatten(pairs.image(index), (255, 255, 255)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
