"""A folder: ours (model.json), open_clip's (open_clip_config.json), transformers' (config.json)."""

from pathlib import Path

from compress import clip
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.sources import huggingface, mclip, open_clip


def load(name: str | Path) -> Clip:
    """Open a model folder; PocketclipError if there is none, or none of the three kinds."""
    folder = Path(name)
    if not folder.is_dir():
        raise PocketclipError(
            f"{folder}: no such folder; models by name start with open_clip: or huggingface:"
        )
    if (folder / "model.json").is_file():
        return clip.load(folder)
    if (folder / open_clip.CONFIG).is_file():
        return open_clip.load(f"local-dir:{folder}")
    if huggingface.is_folder(folder):
        return huggingface.load(str(folder))
    if mclip.is_folder(folder):
        raise PocketclipError(
            f"{folder}: texts only; name the image model that they were trained towards as well: "
            f"{mclip.EXAMPLE.replace('FOLDER', str(folder))}"
        )
    raise PocketclipError(
        f"{folder}: no model there: neither model.json nor {open_clip.CONFIG}, nor "
        f"{huggingface.CONFIG} of a dual encoder"
    )
