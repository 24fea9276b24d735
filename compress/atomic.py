"""Files and folders that are either whole or absent: written aside, synced, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from compress.errors import PocketclipError

REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, or choose another place with --out",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another place with --out",
    errno.EFBIG: "the file would pass the size limit of this shell or disk (ulimit -f)",
    errno.EROFS: "the disk is read-only: choose another place with --out",
    errno.EACCES: "no permission to write there: choose another place with --out",
    errno.EPERM: "no permission to write there: choose another place with --out",
    errno.ENOTDIR: "a file stands where a folder is needed: move it, or choose another --out",
    errno.EEXIST: "a file stands where a folder is needed: move it, or choose another --out",
}


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path`; a reader sees the old bytes or the new ones, never a part."""
    with file(path) as handle:
        handle.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` with UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace the file at `path` with indented JSON; NaN is refused, as JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error.

    Raises PocketclipError with the remedy where the disk is full, read-only or in the way.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise explain(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Build a folder aside; it takes the place of `path` only when the block ends without an error.

    Raises PocketclipError with the remedy where the disk is full, read-only or in the way.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for written in [f for f in partial.rglob("*") if f.is_file()]:
            _sync_file(written)
        _swap(partial, path)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise explain(error, path) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def explain(error: OSError, path: Path) -> PocketclipError:
    """Turn a failed write into one message that names the place and the remedy."""
    remedy = REMEDIES.get(error.errno or 0, f"{error.strerror or error}")
    return PocketclipError(f"cannot write {path}: {remedy}")


def _swap(partial: Path, path: Path) -> None:
    """Put `partial` at `path`; what stood there is moved aside first, as a rename needs room."""
    old = path.with_name(f".partial-old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.replace(old)
    partial.replace(path)
    _sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    """Make the rename itself durable, on file systems that can sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
