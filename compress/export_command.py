"""One export without a recipe: what `pocketclip export` does."""

from pathlib import Path
from typing import Any

from compress import plugin
from compress.fold import fold
from compress.problems import Problems
from compress.recipe import Step, steps
from compress.recipe_file import apply_override
from compress.twin import float_twin


def export(model: str, target: str, overrides: list[str] | None, out: Path | None) -> Path:
    """Write a model as a bundle for one target -> its folder, `bundles/MODEL/TARGET` unless told.

    overrides: settings of the exporter as `precision=int8`; paths in them are relative to the
    working folder. Raises PocketclipError for a mistake in them, GateFailed, Unavailable.
    """
    step = _step(target, overrides or [])
    clip = plugin.source(model, Path.cwd())
    folder = out or Path("bundles") / clip.name.replace("/", "-") / step.folder_name
    folder.parent.mkdir(parents=True, exist_ok=True)
    exporter = plugin.find(plugin.EXPORTERS, step.name)
    clip = fold(clip)
    if not getattr(exporter, "HONOURS_SCHEME", False):
        clip = float_twin(clip)
    exporter.write(clip, step.config, folder)
    return folder


def _step(target: str, overrides: list[str]) -> Step:
    problems, settings = Problems(Path("pocketclip export")), dict[str, Any]()
    for override in overrides:
        apply_override(settings, override, problems)
    found = steps(
        {"export": [{target: settings}]}, "export", plugin.EXPORTERS, Path.cwd(), problems
    )
    problems.raise_if_any()
    return found[0]
