"""One export without a recipe: what `pocketclip export` does."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress import plugin
from compress.data.shards import expand, is_image, sample_files
from compress.fold import fold
from compress.problems import Problems
from compress.recipe import Step, steps
from compress.recipe_file import apply_override
from compress.twin import float_twin
from compress.work import Data

MOST_PICTURES = 1024
"""Of folders, as many as any exporter calibrates on; a photo library has more."""


def export(
    model: str,
    target: str,
    overrides: list[str] | None,
    out: Path | None,
    pictures: Sequence[Path] = (),
) -> Path:
    """Write a model as a bundle for one target -> its folder, `bundles/MODEL/TARGET` unless told.

    overrides: settings of the exporter as `precision=int8`; paths in them are relative to the
    working folder. pictures: shards, images or folders (of which an even sample is read)
    that static integers take their ranges from, without captions. Raises PocketclipError for a
    mistake in them, GateFailed, Unavailable.
    """
    step = _step(target, overrides or [])
    shown = thinned(pictures, MOST_PICTURES) if pictures else []  # before a large model is opened
    clip = plugin.source(model, Path.cwd())
    if shown:
        clip = replace(clip, data=Data(train=shown, captions="none").sized_for(clip))
    folder = out or Path("bundles") / clip.name.replace("/", "-") / step.folder_name
    folder.parent.mkdir(parents=True, exist_ok=True)
    exporter = plugin.find(plugin.EXPORTERS, step.name)
    clip = fold(clip)
    if not getattr(exporter, "HONOURS_SCHEME", False):
        clip = float_twin(clip)
    exporter.write(clip, step.config, folder)
    return folder


def thinned(paths: Sequence[Path], most: int) -> list[Path]:
    """Shards as they are, and of the images at most `most`, evenly spread: the others are not even
    read.
    """
    files = [file for path in expand(paths) for file in sample_files(path)]
    images = [file for file in files if is_image(file)]
    shards = [path for path in expand(paths) if path.is_file() and not is_image(path)]
    step = max(1.0, len(images) / most)
    return [*shards, *(images[int(n * step)] for n in range(min(most, len(images))))]


def _step(target: str, overrides: list[str]) -> Step:
    problems, settings = Problems(Path("pocketclip export")), dict[str, Any]()
    for override in overrides:
        apply_override(settings, override, problems)
    found = steps(
        {"export": [{target: settings}]}, "export", plugin.EXPORTERS, Path.cwd(), problems
    )
    problems.raise_if_any()
    return found[0]
