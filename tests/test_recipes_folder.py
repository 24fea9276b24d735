"""Every recipe that ships is free of mistakes and begins with the command that runs it."""

from pathlib import Path

import pytest

from compress import recipe as recipes

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_has_no_mistakes(path: Path) -> None:
    assert recipes.load(path).name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_begins_with_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("#") and f"pocketclip run {path.relative_to(ROOT)}" in first
