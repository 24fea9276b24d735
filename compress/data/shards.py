"""Reads image-text samples from webdataset shards and from plain folders.

A shard is a .tar, .tar.gz or .tar.xz file whose neighbouring members share a key (the name up to
the first dot): one image, and captions as KEY.txt (one a line) or KEY.json ("caption" or
"captions", and optionally concept, name, style, tags, labels, license, source). A folder holds
the same files loose. Python's tarfile is used rather than webdataset's own reader, which takes a
shard that was cut between two members for a whole one.
"""

import glob
import gzip
import hashlib
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

from braceexpand import braceexpand
from PIL import Image

from compress.data.decode import DAMAGED, decode
from compress.errors import PocketclipError

IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp"}
TEXT_SUFFIXES = {"txt", "json"}
OPENERS: dict[str, Any] = {".tar": open, ".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open}
UNREADABLE = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error)
END_BLOCK = bytes(512)


@dataclass(frozen=True)
class Sample:
    """One image with its captions and whatever its JSON says about it."""

    key: str
    image: Image.Image
    captions: list[str]
    concept: str = ""
    name: str = ""
    style: str = ""
    tags: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    license: str = ""
    source: str = ""


@dataclass
class BadSamples:
    """How many damaged samples may be left out before reading stops; `skipped` names them."""

    budget: int = 0
    skipped: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.skipped.append(message)
        if len(self.skipped) > self.budget:
            raise PocketclipError(
                f"{message}\n  {len(self.skipped)} bad sample(s), {self.budget} allowed: repair or "
                "remove it, or allow more with bad_samples"
            )


def expand(paths: Sequence[Path | str]) -> list[Path]:
    """Globs (`*`) and braces (`{000..003}`) -> existing shard files and folders, sorted."""
    found: list[Path] = []
    for path in paths:
        for pattern in braceexpand(str(path)):
            matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not matches:
                raise PocketclipError(
                    f"{path}: no file matches; check the path in the recipe's data"
                )
            found += [Path(match) for match in matches]
    for path in found:
        if not path.exists():
            raise PocketclipError(f"{path}: no such shard or folder; check the recipe's data")
        if path.is_file() and path.suffix not in OPENERS:
            raise PocketclipError(f"{path}: not a shard (.tar, .tar.gz, .tar.xz) nor a folder")
    if not found:
        raise PocketclipError("no shards given: name at least one shard or folder in data")
    return found


def read_samples(paths: Sequence[Path | str], bad: BadSamples | None = None) -> Iterator[Sample]:
    """Yields every sample, shard by shard, in the order of the files.

    A sample that is damaged counts against `bad` (default: the first one stops); an unreadable
    shard always stops. Raises PocketclipError naming the shard and member.
    """
    bad = bad or BadSamples()
    for path in expand(paths):
        for key, files in group_by_key(read_members(path)):
            message = ""
            try:
                yield make_sample(key, files)
            except BadSampleError as error:
                message = f"{path}: {error}"
            if message:
                bad.add(message)


def count_samples(paths: Sequence[Path | str]) -> int:
    """The number of samples, found without decoding an image."""
    return sum(
        1 for path in expand(paths) for _ in group_by_key(read_members(path, with_content=False))
    )


def digest(paths: Sequence[Path | str]) -> str:
    """sha256 over names and contents; the folder that the shards lie in does not count."""
    total = hashlib.sha256()
    for path in expand(paths):
        files = [path] if path.is_file() else folder_files(path)
        for file in files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            name = file.name if path.is_file() else file.relative_to(path).as_posix()
            total.update(f"{content}  {name}\n".encode())
    return total.hexdigest()


class BadSampleError(ValueError):
    """One sample cannot be used; the message names the member."""


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, lower-case suffix), split at the first dot of the file's name."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return (path.parent / stem).as_posix(), suffix.lower()


def group_by_key(
    members: Iterable[tuple[str, bytes]],
) -> Iterator[tuple[str, dict[str, tuple[str, bytes]]]]:
    """Neighbours with the same key -> (key, {suffix: (member name, content)})."""
    for key, group in groupby(members, key=lambda member: split_name(member[0])[0]):
        yield key, {split_name(name)[1]: (name, content) for name, content in group}


def read_members(path: Path, with_content: bool = True) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the images and captions of a shard or folder."""
    if path.is_dir():
        for file in folder_files(path):
            name = file.relative_to(path).as_posix()
            yield name, file.read_bytes() if with_content else b""
        return
    last = "the first member"
    try:
        with OPENERS[path.suffix](path, "rb") as stream, tarfile.open(fileobj=stream) as tar:
            for member in tar:
                last = member.name
                if member.isfile() and wanted(member.name):
                    extracted = tar.extractfile(member) if with_content else None
                    yield member.name, extracted.read() if extracted else b""
            check_end(tar, stream)
    except UNREADABLE as error:
        raise PocketclipError(
            f"{path}: unreadable after {last} ({error}); the shard is truncated or damaged, "
            "copy or build it again"
        ) from error


def check_end(tar: tarfile.TarFile, stream: IO[bytes]) -> None:
    """tarfile takes a missing or damaged header for the end of the archive; only zeros end it."""
    stream.seek(tar.offset)
    if stream.read(len(END_BLOCK)) != END_BLOCK:
        raise tarfile.ReadError("no end-of-archive mark")


def folder_files(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if wanted(file.relative_to(folder).as_posix()))


def wanted(name: str) -> bool:
    return not PurePosixPath(name).name.startswith((".", "__")) and (
        split_name(name)[1] in IMAGE_SUFFIXES | TEXT_SUFFIXES
    )


def make_sample(key: str, files: dict[str, tuple[str, bytes]]) -> Sample:
    images = [files[suffix] for suffix in files if suffix in IMAGE_SUFFIXES]
    if not images:
        raise BadSampleError(f"{key}: captions without an image (.jpg, .png or .webp)")
    about = read_json(*files["json"]) if "json" in files else {}
    captions = about.get("captions") or about.get("caption") or []
    captions = [captions] if isinstance(captions, str) else list(captions)
    if "txt" in files:
        captions += files["txt"][1].decode("utf-8", "replace").splitlines()
    captions = [text for text in map(str.strip, map(str, captions)) if text]
    name, content = images[0]
    if not captions:
        raise BadSampleError(f"{name}: no caption beside it ({key}.txt or {key}.json)")
    try:
        image = decode(content)
    except DAMAGED as error:
        raise BadSampleError(f"{name}: not a whole image ({error})") from error
    known = {
        k: about[k]
        for k in ("concept", "style", "tags", "labels", "license", "source")
        if k in about
    }
    return Sample(key, image, captions, name=about.get("name", captions[0]), **known)


def read_json(name: str, content: bytes) -> dict[str, Any]:
    try:
        about = json.loads(content)
    except ValueError as error:
        raise BadSampleError(f"{name}: not JSON ({error})") from error
    if not isinstance(about, dict):
        raise BadSampleError(f"{name}: not a JSON object")
    return about
