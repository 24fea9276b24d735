"""Finds stages, exporters, sources and hosts: one file each, named by its file name."""

import importlib
import pkgutil
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from compress.errors import PocketclipError

if TYPE_CHECKING:
    from compress.clip import Clip

STAGES = "compress.stages"
EXPORTERS = "export"
SOURCES = "compress.sources"
HOSTS = "benchmarks.hosts"
OPEN_CLIP = ("hf-hub", "local-dir")
"""How open_clip's own names begin; they stand so on models' pages."""


def names(package: str) -> list[str]:
    """File names in a plugin package, without those that begin with an underscore."""
    paths = importlib.import_module(package).__path__
    found = [module.name for module in pkgutil.iter_modules(paths)]
    return sorted(name for name in found if not name.startswith("_"))


def find(package: str, name: str) -> ModuleType:
    """Import the file `name` of a plugin package.

    Raises PocketclipError with a suggestion where there is no such file.
    """
    known = names(package)
    if name not in known:
        raise PocketclipError(f"no {name!r} in {package}{did_you_mean(name, known)}")
    return importlib.import_module(f"{package}.{name}")


def source(model: str, base: Path) -> "Clip":
    """Open the model that a recipe names.

    `open_clip:NAME` goes to sources/open_clip.py and so on; anything else is a folder, relative to
    `base` (the folder of the recipe), for sources/folder.py.
    """
    kind, argument = split_source(model)
    nearby = base / argument
    argument = str(nearby) if kind == "folder" or nearby.exists() else argument
    clip: Clip = find(SOURCES, kind).load(argument)
    return clip


def split_source(model: str) -> tuple[str, str]:
    """`open_clip:NAME` -> (`open_clip`, `NAME`); a path -> (`folder`, the path).

    `hf-hub:NAME` and `local-dir:NAME` are open_clip's.
    """
    kind, colon, argument = model.partition(":")
    if kind in OPEN_CLIP:
        return "open_clip", model
    return (kind, argument) if colon and kind in names(SOURCES) else ("folder", model)


def did_you_mean(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f", did you mean {close[0]!r}?"
    return f" (there is: {', '.join(known) or 'nothing'})"
