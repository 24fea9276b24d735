"""The YAML of a recipe as plain data: which line a key stands on, and what `--set` changes."""

import re
from pathlib import Path
from typing import Any

import yaml

from compress.errors import PocketclipError
from compress.plugin import did_you_mean
from compress.problems import Place, Problems

# Sections that a recipe may leave out and `--set` may then fill.
SECTIONS = ("data", "evaluate", "bench")


def read(path: Path, problems: Problems) -> dict[str, Any]:
    """Parse the YAML; record the line of every key, and keys written twice."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PocketclipError(f"{path}: cannot read the recipe: {reason}") from error
    except yaml.YAMLError as error:
        raise PocketclipError(f"{path}: not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise PocketclipError(f"{path}: a recipe is a mapping that begins with `name:`")
    _walk(node, (), problems)
    return raw


def _walk(node: yaml.Node | None, place: Place, problems: Problems) -> None:
    if node is None:
        return
    problems.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _walk(child, (*place, index), problems)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            inner = (*place, key.value)
            if inner in problems.lines:
                problems.add(inner, "written twice")
            problems.lines[inner] = key.start_mark.line + 1
            _walk(child, inner, problems)


def apply_override(raw: dict[str, Any], override: str, problems: Problems) -> None:
    """Apply one `--set place=value` to the parsed YAML."""
    where, equals, text = override.partition("=")
    if not equals:
        problems.add((), f"--set {override}: write it as place=value")
        return
    parts = [part for part in re.split(r"[.\[\]]+", where.strip()) if part]
    target: Any = raw
    for depth, part in enumerate(parts[:-1]):
        step = _enter(target, part)
        if step is None:
            place = ".".join(parts[: depth + 1])
            known = _keys(target)
            problems.add((), f"--set {where}: no {place!r} here{did_you_mean(part, known)}")
            return
        target = step
    if not isinstance(target, dict):
        problems.add((), f"--set {where}: name a key inside the step, such as {where}.KEY")
        return
    target[parts[-1]] = yaml.safe_load(text)


def _enter(target: Any, part: str) -> Any:
    """The child of a mapping by key, or of a list of steps by index or by name; None if absent."""
    if isinstance(target, dict):
        return target.setdefault(part, {}) if part in SECTIONS else target.get(part)
    if not isinstance(target, list):
        return None
    named = [row for row in target if isinstance(row, dict) and part in row]
    if part.isdigit() and int(part) < len(target):
        row = target[int(part)]
        named = [row] if isinstance(row, dict) else []
        part = next(iter(row), part) if named else part
    if len(named) != 1:
        return None
    named[0][part] = named[0][part] or {}
    return named[0][part]


def _keys(target: Any) -> list[str]:
    if isinstance(target, list):
        return [next(iter(row)) for row in target if isinstance(row, dict) and row]
    return list(target) if isinstance(target, dict) else []
