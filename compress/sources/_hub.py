"""Files of a repository on Hugging Face's hub, and which revision of it they are."""

from collections.abc import Sequence
from pathlib import Path

from compress.errors import PocketclipError

CARD = "README.md"


def fetched(repository: str, files: Sequence[Sequence[str]], source: str = "huggingface") -> Path:
    """The folder of a repository's files, from the hub or its cache.

    files: for each the names that will do, the first that is there is taken; the model card comes
    along where there is one. PocketclipError says what to copy where the hub gives nothing.
    """
    try:
        paths = [_first(repository, names) for names in files]
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        wanted = ", ".join(" or ".join(names) for names in files)
        raise PocketclipError(
            f"{source}:{repository}: no such folder, and the hub gives nothing ({reason}); "
            f"without the hub, copy {wanted} of that repository into a folder and name "
            f"the folder instead: {source}:FOLDER"
        ) from None
    optional(repository, CARD)
    return root(paths[0], files[0])


def optional(repository: str, file: str) -> Path | None:
    """A file of a repository; None where it, or the hub, is not there."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError):
        return None


def root(path: Path, names: Sequence[str]) -> Path:
    """The folder of a repository from the path of one of its files."""
    depth = next(name.count("/") for name in names if path.as_posix().endswith(name))
    return path.parents[depth]


def revision(folder: Path) -> dict[str, str]:
    """The commit that a folder of the hub's cache holds, for provenance; nothing for others."""
    places = folder.parts
    if "snapshots" not in places[:-1]:
        return {}
    return {"revision": places[places.index("snapshots") + 1]}


def _first(repository: str, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download

    *others, last = names
    for name in others:
        path = optional(repository, name)
        if path is not None:
            return path
    return Path(hf_hub_download(repository, last))
