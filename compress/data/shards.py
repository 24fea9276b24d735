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
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from PIL import Image
from pydantic import BaseModel, ValidationError

from compress.data.decode import DAMAGED, decode
from compress.errors import PocketclipError

IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp"}
TEXT_SUFFIXES = {"txt", "json"}
OPENERS: dict[str, Any] = {".tar": open, ".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open}
UNREADABLE = (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error)
END_BLOCK = bytes(512)
HASHED_WHOLE = 2**28
"""Bytes up to which a shard counts with all its content in a digest."""
EDGE = 2**20


@dataclass(frozen=True)
class Sample:
    """One image with its captions and whatever its JSON says about it."""

    key: str
    image: Image.Image
    content: bytes
    """The image file."""
    captions: list[str]
    concept: str = ""
    name: str = ""
    style: str = ""
    tags: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    license: str = ""
    source: str = ""


class SampleJson(BaseModel):
    """What KEY.json may say; anything else in it is passed over."""

    caption: str | None = None
    captions: list[str] = []
    concept: str = ""
    name: str = ""
    style: str = ""
    tags: list[str] = []
    labels: dict[str, str] = {}
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
    """Shard files, images, globs of them and folders -> what is there, each glob's finds sorted."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir() or (path.is_file() and (path.suffix in OPENERS or is_image(path))):
            found.append(path)
        elif path.is_file():
            raise PocketclipError(
                f"{path}: not a shard (.tar, .tar.gz, .tar.xz), an image (.jpg, .png, .webp) or a "
                "folder"
            )
        elif glob.has_magic(str(path)) and (matches := sorted(glob.glob(str(path)))):
            found += expand([Path(match) for match in matches])
        else:
            raise PocketclipError(f"{path}: no such shard or folder; check the paths under data")
    if not found:
        raise PocketclipError("no shards given: name at least one shard or folder under data")
    return found


def is_image(path: Path) -> bool:
    return path.suffix.removeprefix(".").lower() in IMAGE_SUFFIXES


def read_samples(
    paths: Sequence[Path | str], bad: BadSamples | None = None, needs_caption: bool = True
) -> Iterator[Sample]:
    """Yields every sample, shard by shard, in the order of the files.

    needs_caption: whether an image without a caption is damaged; if not, texts without an image
    are passed over. A sample that is damaged counts against `bad` (default: the first one stops);
    an unreadable shard always stops. Raises PocketclipError naming the shard and member.
    """
    bad = bad or BadSamples()
    for path in expand(paths):
        for key, members in groupby(read_members(path), attrgetter("key")):
            found = list(members)
            if not (needs_caption or has_image(found)):
                continue
            try:
                sample = make_sample(key, found, needs_caption)
            except BadSampleError as error:
                bad.add(f"{path}: {error}")
            else:
                yield sample


def count_samples(paths: Sequence[Path | str], needs_caption: bool = True) -> int:
    """The number of samples, found without decoding an image."""
    count = 0
    for path in expand(paths):
        members = read_members(path, with_content=False)
        samples = (own for _, own in groupby(members, attrgetter("key")))
        count += sum(1 for own in samples if needs_caption or has_image(own))
    return count


def digest(paths: Sequence[Path | str]) -> str:
    """sha256 over names and contents; the folder that the shards lie in does not count."""
    total = hashlib.sha256()
    for path in expand(paths):
        for file in sample_files(path):
            content = _content(file)
            name = file.name if path.is_file() else file.relative_to(path).as_posix()
            total.update(f"{content}  {name}\n".encode())
    return total.hexdigest()


def _content(file: Path) -> str:
    """sha256 of a file; of a large one the size, the beginning and the end have to do."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= HASHED_WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        parts = [str(size).encode(), stream.read(EDGE)]
        stream.seek(-EDGE, os.SEEK_END)
        return hashlib.sha256(b"".join([*parts, stream.read(EDGE)])).hexdigest()


class BadSampleError(ValueError):
    """One sample cannot be used; the message names the member."""


class Member(NamedTuple):
    """One file of a sample."""

    key: str
    suffix: str
    name: str
    content: bytes


def has_image(members: Iterable[Member]) -> bool:
    return any(member.suffix in IMAGE_SUFFIXES for member in members)


def shard_key(name: str) -> tuple[str, str]:
    """(key, suffix) of a shard's member: split at the first dot, as webdataset does."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return (path.parent / stem).as_posix(), suffix.lower()


def folder_key(name: str) -> tuple[str, str]:
    """(key, suffix) of a loose file: split at the last dot, since photos have dots in names."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix(), path.suffix.removeprefix(".").lower()


def sample_files(path: Path) -> list[Path]:
    """The files that a shard, an image or a folder is: an image brings the texts beside it."""
    if path.is_dir():
        return folder_files(path)
    beside = (path.with_suffix(f".{suffix}") for suffix in sorted(TEXT_SUFFIXES))
    return [path, *filter(Path.is_file, beside)] if is_image(path) else [path]


def folder_files(folder: Path) -> list[Path]:
    """The images and captions in a folder and below, those of one sample next to each other."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    kept = (name for name in names if wanted(name, folder_key(name)[1]))
    return [folder / name for name in sorted(kept, key=folder_key)]


def wanted(name: str, suffix: str) -> bool:
    hidden = PurePosixPath(name).name.startswith((".", "__"))
    return not hidden and suffix in IMAGE_SUFFIXES | TEXT_SUFFIXES


def read_members(path: Path, with_content: bool = True) -> Iterator[Member]:
    """The images and captions of a shard or folder."""
    if path.is_dir() or is_image(path):
        folder = path if path.is_dir() else path.parent
        for file in sample_files(path):
            name = file.relative_to(folder).as_posix()
            yield Member(*folder_key(name), name, file.read_bytes() if with_content else b"")
        return
    last = "the first member"
    try:
        with (
            OPENERS[path.suffix](path, "rb") as stream,
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            for member in tar:
                last = member.name
                key, suffix = shard_key(last)
                if member.isfile() and wanted(last, suffix):
                    extracted = tar.extractfile(member) if with_content else None
                    yield Member(key, suffix, last, extracted.read() if extracted else b"")
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


def make_sample(key: str, members: list[Member], needs_caption: bool = True) -> Sample:
    """One sample of its files. Raises BadSampleError for one without an image, with a damaged one,
    or, where they are needed, without captions.
    """
    images = [member for member in members if member.suffix in IMAGE_SUFFIXES]
    if not images:
        raise BadSampleError(f"{key}: captions without an image (.jpg, .png or .webp)")
    about, lines = SampleJson(), []
    for member in members:
        if member.suffix == "json":
            about = read_json(member)
        elif member.suffix == "txt":
            lines = member.content.decode("utf-8", "replace").splitlines()
    captions = [about.caption or "", *about.captions, *lines]
    captions = [text.strip() for text in captions if text.strip()]
    name = images[0].name
    if needs_caption and not captions:
        raise BadSampleError(
            f"{name}: no caption beside it ({key}.txt or {key}.json); for pictures alone, say "
            "`data.captions: none`"
        )
    try:
        image = decode(images[0].content)
    except DAMAGED as error:
        raise BadSampleError(f"{name}: not a whole image ({error})") from error
    facts = about.model_dump(exclude={"caption", "captions", "name"})
    title = about.name or (captions[0] if captions else PurePosixPath(key).name)
    return Sample(key, image, images[0].content, captions, name=title, **facts)


def read_json(member: Member) -> SampleJson:
    try:
        return SampleJson.model_validate_json(member.content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadSampleError(
            f"{member.name}: {place + ': ' if place else ''}{first['msg']}"
        ) from error
