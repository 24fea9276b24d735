"""Samples of webdataset shards by their position in an endless, shuffled order.

Which sample stands at a position is a function of (seed, position) alone, so training resumes
exactly, on any number of processes, without having kept a place. Shards are read from disk; those
of an object store are copied into a cache folder first, one at a time.
"""

import hashlib
import os
import random
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from compress.data.shards import UNREADABLE, expand, shard_key
from compress.errors import PocketclipError

REMOTE = ("http://", "https://", "file://", "pipe:")


@dataclass(frozen=True)
class TarIndex:
    """Where each sample's members lie in an uncompressed tar."""

    path: Path
    samples: list[tuple[str, dict[str, tuple[int, int]]]]
    """(key, suffix -> (first byte, number of bytes)), in the order of the file."""

    def read(self, row: int) -> tuple[str, dict[str, bytes]]:
        """A sample's key and members; rows past the end begin again."""
        key, places = self.samples[row % len(self.samples)]
        with self.path.open("rb") as file:
            found = {s: os.pread(file.fileno(), size, at) for s, (at, size) in places.items()}
        return key, found


@lru_cache(maxsize=256)
def index_tar(path: Path) -> TarIndex:
    """Read a tar's headers; PocketclipError if it is damaged, compressed or empty."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = [member for member in tar if member.isfile()]
    except UNREADABLE as error:
        raise PocketclipError(
            f"{path}: not a plain tar ({error}); streamed shards are uncompressed"
        ) from error
    rows = [(*shard_key(m.name), (m.offset_data, m.size)) for m in files]
    samples = [
        (key, {suffix: place for _, suffix, place in members})
        for key, members in groupby(rows, lambda row: row[0])
    ]
    if not samples:
        raise PocketclipError(f"{path}: no sample in it")
    return TarIndex(path, samples)


@dataclass(frozen=True)
class Source:
    """Shards that are drawn from together, and their order."""

    shards: tuple[str, ...]
    seed: int
    cache: Path | None = None
    samples_per_shard: int | None = None
    """Counted alike for every shard: one with fewer begins again, one with more loses the rest.
    None counts each, which reads all headers first."""
    sizes: list[int] = field(default_factory=list)

    def counts(self) -> list[int]:
        """Samples of each shard."""
        if not self.sizes:
            each = self.samples_per_shard
            # In one go: reading threads may all come here first, and none may see half a list.
            self.sizes[:] = [
                each or len(index_tar(self.local(shard)).samples) for shard in self.shards
            ]
        return self.sizes

    def local(self, shard: str) -> Path:
        """The shard on disk, copied there if it is remote."""
        if not shard.startswith(REMOTE):
            return Path(shard)
        if self.cache is None:
            raise PocketclipError(f"{shard}: a remote shard needs stream.cache, a folder on disk")
        return fetch(shard, self.cache)

    def read(self, position: int, ahead: int = 0) -> tuple[str, dict[str, bytes]]:
        """The sample at a position -> (shard and key, members); `ahead` later ones of its shard
        stand in for bad samples.
        """
        counts = self.counts()
        epoch, inside = divmod(position, sum(counts))
        for shard in _shuffled(len(counts), (self.seed, epoch)):
            if inside < counts[shard]:
                order = _shuffled(counts[shard], (self.seed, epoch, shard))
                row = order[(inside + ahead) % counts[shard]]
                key, members = index_tar(self.local(self.shards[shard])).read(row)
                return f"{self.shards[shard]}: {key}", members
            inside -= counts[shard]
        raise AssertionError(position)


@lru_cache(maxsize=64)
def _shuffled(num: int, seed: tuple[int, ...]) -> list[int]:
    order = list(range(num))
    random.Random(repr(seed)).shuffle(order)
    return order


def expand_shards(patterns: Sequence[str]) -> tuple[str, ...]:
    """Globs and brace ranges (a-{000..031}.tar) -> shards; remote ones are only unfolded."""
    import braceexpand

    found: list[str] = []
    for pattern in patterns:
        for name in braceexpand.braceexpand(pattern):
            if name.startswith(REMOTE):
                found.append(name)
                continue
            for path in expand([Path(name)]):
                found += map(str, sorted(path.glob("*.tar")) if path.is_dir() else [path])
    if not found:
        raise PocketclipError(f"{', '.join(patterns)}: no shard (.tar) there")
    return tuple(found)


def fetch(url: str, cache: Path) -> Path:
    """Copy a remote shard into the cache, whole or not at all.

    pipe:COMMAND takes what a command writes, as webdataset has it (aws s3 cp ... -).
    """
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = cache / f"{name}.tar"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{name}-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if url.startswith("pipe:"):
                subprocess.run(url.removeprefix("pipe:"), shell=True, check=True, stdout=file)
            else:
                with urllib.request.urlopen(url) as stream:
                    shutil.copyfileobj(stream, file)
        partial.replace(path)
    except (subprocess.CalledProcessError, urllib.error.URLError, OSError) as error:
        raise PocketclipError(f"{url}: cannot be read ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
