"""Collects the mistakes in a recipe, so that all of them are reported together."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compress.errors import PocketclipError
from compress.plugin import did_you_mean

Place = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class Problems:
    """Mistakes found so far, each with its place and, where known, its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Place, int] = {}
        self.found: list[tuple[int, str]] = []

    def add(self, place: Place, message: str) -> None:
        known = [place[:n] for n in range(len(place), 0, -1) if place[:n] in self.lines]
        line = self.lines[known[0]] if known else 0
        self.found.append((line, f"{spell(place)}: {message}" if place else message))

    def raise_if_any(self) -> None:
        if self.found:
            rows = [
                f"  {'line ' + str(line) + ': ' if line else ''}{text}"
                for line, text in sorted(self.found, key=lambda row: row[0])
            ]
            count = "1 mistake" if len(rows) == 1 else f"{len(rows)} mistakes"
            raise PocketclipError(f"{self.path}: {count}\n" + "\n".join(rows))


def spell(place: Place) -> str:
    """("stages", 0, "distill", "lr") -> `stages[0].distill.lr`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.lstrip(".")


def validate(model: type[Model], value: Any, place: Place, problems: Problems) -> Model | None:
    """Build `model`, turning each of pydantic's errors into one problem."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        for row in error.errors():
            inner = row["loc"]
            if row["type"] == "extra_forbidden":
                known = _known_keys(model, inner[:-1])
                message = f"unknown key{did_you_mean(str(inner[-1]), known)}"
            elif row["type"] == "missing":
                message = "this key is required"
            else:
                message = f"{row['msg'][:1].lower()}{row['msg'][1:]} (found {row['input']!r:.80})"
            problems.add((*place, *inner), message)
        return None


def _known_keys(model: type[BaseModel], place: Place) -> list[str]:
    """Keys that are allowed at a place inside `model`."""
    for part in place:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None:
            continue
        inner = _models_in(field.annotation)
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]
