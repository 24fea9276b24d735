"""Checking a bundle that came from elsewhere: plain paths, hashes, goldens, before it is used."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from compress import atomic, plugin
from compress.errors import GateFailed, PocketclipError
from compress.preprocess import Preprocess
from compress.tokenizer import Tokenizer, TokenizerContract
from export import _bundle

GOLDEN = "golden/golden.json"
PARTS = (*_bundle.TOWERS, "tokenizer", "files")
REQUIRED = ("target", "precision", "model", "preprocess", "license", "provenance")


def verify(folder: Path) -> dict[str, float]:
    """Check every hash, then replay preprocessing, token ids and both towers on the goldens.

    -> the worst golden cosine per tower. Raises PocketclipError for a missing, changed or misplaced
    file, GateFailed where a golden isn't met, Unavailable where the runtime cannot run here.
    """
    folder = Path(folder)
    bundle = read(folder)
    check_files(folder, bundle["files"])
    golden = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
    named = [entry[key] for entry in golden["images"] for key in ("file", "pixels", "embedding")]
    named += [entry["embedding"] for entry in golden["texts"]]
    _listed(folder, bundle, [f"golden/{name}" for name in named])
    check_pixels(folder / "golden", golden, Preprocess.from_bundle(bundle["preprocess"]))
    check_ids(golden, _tokenizer(folder, bundle["tokenizer"]))
    encoder = plugin.find(plugin.EXPORTERS, bundle["target"]).load(folder)
    met = _bundle.cosines(folder / "golden", golden["images"], golden["texts"], encoder)
    for tower, value in met.items():
        if not value >= golden["min_cosine"][tower]:
            raise GateFailed(
                f"{folder}: {tower} tower meets its goldens at cosine {value:.5f}, the bundle "
                f"promises {golden['min_cosine'][tower]}: another runtime version or CPU?"
            )
    return met


def read(folder: Path) -> dict[str, Any]:
    """bundle.json of a folder; PocketclipError if there is none, or one of another schema."""
    path = folder / "bundle.json"
    try:
        bundle = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PocketclipError(f"{path}: no such file; a bundle folder holds bundle.json") from None
    except json.JSONDecodeError as error:
        raise PocketclipError(f"{path}: not JSON: {error}; export the bundle again") from None
    found = bundle.get("schema_version") if isinstance(bundle, dict) else None
    if found != _bundle.SCHEMA_VERSION:
        raise PocketclipError(
            f"{path}: schema_version {found}, this version reads {_bundle.SCHEMA_VERSION}"
        )
    missing = [key for key in (*PARTS, *REQUIRED) if key not in bundle]
    if missing:
        raise PocketclipError(f"{path}: lacks {', '.join(missing)}; export the bundle again")
    _listed(folder, bundle, [*(bundle[part]["file"] for part in PARTS[:-1]), GOLDEN])
    return dict(bundle)


def check_files(folder: Path, files: dict[str, str]) -> None:
    """Every listed file lies inside the folder and has its hash; all problems in one message."""
    problems = []
    for name, digest in files.items():
        path = folder / name
        if not _plain(name) or path.resolve() != folder.resolve() / name:
            problems.append(f"{name} is not a plain path")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif digest != f"sha256:{atomic.sha256(path)}":
            problems.append(f"{name} has changed since it was written")
    if problems:
        raise PocketclipError(f"{folder}: {'; '.join(problems)}; export or copy the bundle again")


def check_pixels(folder: Path, golden: dict[str, Any], preprocess: Preprocess) -> None:
    """The preprocessing of the contract gives the golden pixels."""
    for entry in golden["images"]:
        with Image.open(folder / entry["file"]) as picture:
            found = preprocess(picture).numpy()
        wanted = np.load(folder / entry["pixels"], allow_pickle=False)
        if found.shape != wanted.shape or np.abs(found - wanted).max() > golden["max_pixel_error"]:
            raise GateFailed(f"{folder / entry['file']}: preprocessing gives other pixels")


def check_ids(golden: dict[str, Any], tokenizer: Tokenizer) -> None:
    """The tokenizer of the contract gives the golden ids."""
    for entry in golden["texts"]:
        found = tokenizer([entry["text"]])[0].tolist()
        if found != entry["ids"]:
            raise GateFailed(f"text {entry['text'][:20]!r}: the tokenizer gives other ids")


def _listed(folder: Path, bundle: dict[str, Any], names: list[str]) -> None:
    """Nothing is opened that `files` doesn't hold a hash of."""
    unknown = [name for name in names if _bundle.digest(bundle["files"], name) is None]
    if unknown:
        raise PocketclipError(f"{folder}: {', '.join(unknown)} not listed in files; don't use it")


def _plain(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _tokenizer(folder: Path, entry: dict[str, Any]) -> Tokenizer:
    contract = TokenizerContract.model_validate({k: v for k, v in entry.items() if k != "file"})
    return Tokenizer.load(folder / entry["file"], contract)
