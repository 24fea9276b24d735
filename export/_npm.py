"""Packages of the npm registry that run in a browser: fetched once by npm, checked, kept.

Their versions and hashes are pinned here, so that a page behaves the same wherever it is written.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from compress import atomic
from compress.errors import PocketclipError
from export import Unavailable

CACHE = Path.home() / ".cache" / "pocketclip" / "npm"

# Without a network, say so at once instead of after minutes of trying again.
QUIETLY = ("--loglevel=error", "--fetch-retries=0", "--fetch-timeout=120000")

# name -> version and the sha512 of its archive, as npm's own lock files state it
PACKAGES = {
    "onnxruntime-web": (
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    ),
    "@huggingface/tokenizers": (
        "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    ),
    "@huggingface/transformers": (
        "4.3.1",
        "5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
    ),
}


def package(name: str, cache: Path = CACHE) -> Path:
    """The folder of a package, without its dependencies.

    Raises Unavailable where npm is missing or fetches nothing, PocketclipError for another hash.
    """
    version, digest = PACKAGES[name]
    folder = cache / f"{name.replace('/', '-').removeprefix('@')}-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            archive = _fetch(f"{name}@{version}", Path(scratch))
            _check(archive, digest, name)
            with atomic.folder(folder) as target, tarfile.open(archive) as tar:
                tar.extractall(target, filter="data")
    return folder / "package"


def _fetch(name: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable(f"npm isn't installed; it fetches {name}")
    command = [npm, "pack", name, *QUIETLY, "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[0]
        raise Unavailable(f"npm cannot fetch {name}: {reason}")
    return archives[0]


def _check(archive: Path, digest: str, name: str) -> None:
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != digest:
        raise PocketclipError(f"{name}: the registry sent other bytes than those pinned: {found}")
