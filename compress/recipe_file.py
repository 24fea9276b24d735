"""The YAML of a recipe as plain data: which line a key stands on, and what `--set` changes."""

import re
from pathlib import Path
from typing import Any

import yaml

from compress.errors import PocketclipError
from compress.plugin import did_you_mean
from compress.problems import Place, Problems

STEPS = ("stages", "export")


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
    try:
        target, parts = _enter(raw, parts)
        for part in parts[:-1]:
            target = _child(target, part)
        if not isinstance(target, dict) or not parts:
            raise LookupError("name a key inside it, such as stages.distill.lr")
    except LookupError as error:
        problems.add((), f"--set {where}: {error.args[0]}")
        return
    target[parts[-1]] = yaml.safe_load(text)


def _enter(raw: dict[str, Any], parts: list[str]) -> tuple[Any, list[str]]:
    """Where the last parts of a place apply: in the settings of a step, or in the recipe itself."""
    if len(parts) < 2 or parts[0] not in STEPS:
        return raw, parts
    steps, wanted = raw.get(parts[0]) or [], parts[1]
    names = [next(iter(row), "") if isinstance(row, dict) else row for row in steps]
    chosen = [n for n, name in enumerate(names) if wanted in (name, str(n))]
    if not chosen:
        raise LookupError(f"no {wanted!r} in {parts[0]}{did_you_mean(wanted, names)}")
    if len(chosen) > 1:
        places = " or ".join(f"{parts[0]}[{n}]" for n in chosen)
        raise LookupError(f"there are {len(chosen)} such steps: say {places}")
    [index] = chosen
    name = names[index]
    if not isinstance(steps[index], dict) or steps[index][name] is None:
        steps[index] = {name: {}}
    named_too = wanted != name and len(parts) > 3 and parts[2] == name
    return steps[index][name], parts[3 if named_too else 2 :]


def _child(target: Any, part: str) -> Any:
    """The mapping under a key, made if it is not there: what may stand there is checked later."""
    if not isinstance(target, dict):
        raise LookupError(f"{part!r} stands inside a value, not a mapping")
    if target.get(part) is None:
        target[part] = {}
    return target[part]
