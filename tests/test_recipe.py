"""A recipe reports all its mistakes at once, each with its place and a remedy."""

from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.errors import PocketclipError

pytestmark = pytest.mark.usefixtures("toys")


def mistakes(path: Path, *overrides: str) -> list[str]:
    """The lines of the message, without the first."""
    with pytest.raises(PocketclipError) as caught:
        recipes.load(path, list(overrides))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def edit(path: Path, old: str, new: str) -> Path:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return path


def test_good_recipe_becomes_typed_steps(recipe_file: Path) -> None:
    recipe = recipes.load(recipe_file)
    assert [step.folder_name for step in recipe.stages] == ["nudge", "count"]
    assert [step.folder_name for step in recipe.export] == ["onnxruntime-int8"]
    assert recipe.stages[0].config.amount == 0.25
    assert recipe.shards().train == [recipe_file.parent / "pictures"]


def test_all_mistakes_come_together_with_line_place_and_suggestion(recipe_file: Path) -> None:
    edit(recipe_file, "{steps: 3}", "{stepz: 3}")
    edit(recipe_file, "- nudge: {amount: 0.25, noise: 0.1}", "- nudje: {}")
    edit(recipe_file, "- onnxruntime: {precision: int8}", "- onnxruntime: {precision: int3}")
    edit(recipe_file, "classes: classes.json", "classes: missing.json")
    edit(recipe_file, "model: model", "model: nothing\nsead: 1")
    found = mistakes(recipe_file)
    assert [line.split(": ", 2)[:2] for line in found] == [
        ["line 2", "model"],
        ["line 3", "sead"],
        ["line 7", "data.classes"],
        ["line 10", "stages[0].nudje"],
        ["line 11", "stages[1].count.stepz"],
        ["line 13", "export[0].onnxruntime.precision"],
    ]
    assert "no such file: nothing" in found[0]
    assert "did you mean 'seed'?" in found[1]
    assert "did you mean 'nudge'?" in found[3]
    assert found[4].endswith("stages[1].count.stepz: unknown key, did you mean 'steps'?")
    assert "'fp32' or 'int8'" in found[5] and "int3" in found[5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train: [pictures]", "train: [shards/*.tar]", "shards/*.tar: no such shard or folder"),
        ("image_size: 32", "image_size: large", "data.image_size: input should be a valid integer"),
        ("name: small", "seed: 1", "name: this key is required"),
        ("name: small", "name: small\nname: two", "name: written twice"),
        ("name: small", "name: ../up", "name: string should match"),
        ("- count: {steps: 3}", "- count: 3", "stages[1].count: input should be a valid dict"),
        ("- count: {steps: 3}", "- 3", "stages[1]: one `name: {settings}` is needed"),
        ("amount: 0.25", "words: none.txt", "stages[0].nudge.words: no such file"),
        ("image_size: 32", "templates: [a photo]", "data.templates[0]: a template needs {}"),
        ("image_size: 32", "evaluete: {}", "data.evaluete: unknown key, did you mean 'evaluate'?"),
    ],
)
def test_mistake_names_its_place(recipe_file: Path, old: str, new: str, message: str) -> None:
    [line] = mistakes(edit(recipe_file, old, new))
    assert message in line


def test_two_exports_into_one_folder_are_refused(recipe_file: Path) -> None:
    again = "- onnxruntime: {precision: int8}"
    [line] = mistakes(edit(recipe_file, again, f"{again}\n  {again}"))
    assert "export[1].onnxruntime: writes export/onnxruntime-int8 as export[0] does" in line


def test_missing_recipe_and_broken_yaml_are_explained(tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match="cannot read the recipe: No such file"):
        recipes.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(PocketclipError, match="not YAML"):
        recipes.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(PocketclipError, match="a recipe is a mapping"):
        recipes.load(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    "place",
    ["stages.nudge.amount", "stages[0].nudge.amount", "stages.0.amount", "stages[0].amount"],
)
def test_set_changes_a_step_by_name_or_index(recipe_file: Path, place: str) -> None:
    recipe = recipes.load(recipe_file, [f"{place}=1e-3"])
    assert recipe.stages[0].config.amount == 1e-3
    assert recipe.stages[0].config.noise == 0.1


def test_a_path_in_a_step_starts_at_the_recipe(recipe_file: Path) -> None:
    recipe = recipes.load(recipe_file, ["stages.nudge.words=classes.json"])
    assert recipe.stages[0].config.words == recipe_file.parent.absolute() / "classes.json"


def test_set_fills_what_the_recipe_leaves_out(recipe_file: Path) -> None:
    edit(recipe_file, "- count: {steps: 3}", "- count:")
    overrides = [
        "stages.count.steps=7",
        "seed=3",
        "evaluate.batch_size=4",
        "data.templates=['x {}']",
    ]
    recipe = recipes.load(recipe_file, overrides)
    assert recipe.stages[1].config.steps == 7
    assert (recipe.seed, recipe.evaluate.batch_size) == (3, 4)
    assert recipe.data.templates == ("x {}",)


def test_set_with_a_mistake_is_reported_with_the_others(recipe_file: Path) -> None:
    found = mistakes(
        recipe_file, "stages.cuont.steps=1", "stages.count.stepz=1", "seed", "stages.count=1"
    )
    assert "--set stages.cuont.steps: no 'cuont' in stages, did you mean 'count'?" in found
    assert "--set seed: write it as place=value" in found
    assert any("stages[1].count.stepz: unknown key" in line for line in found)
    assert any("stages.count: name a key inside it" in line for line in found)


def test_a_stage_that_stands_twice_is_set_by_index_only(recipe_file: Path) -> None:
    edit(recipe_file, "- count: {steps: 3}", "- count: {steps: 3}\n  - count: {steps: 4}")
    assert recipes.load(recipe_file, ["stages.2.steps=9"]).stages[2].config.steps == 9
    [line] = mistakes(recipe_file, "stages.count.steps=9")
    assert "there are 2 such steps: say stages[1] or stages[2]" in line


def test_resolved_recipe_can_be_loaded_from_anywhere(recipe_file: Path, tmp_path: Path) -> None:
    recipe = recipes.load(recipe_file)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "recipe.yaml"
    moved.write_text(recipe.resolved())
    again = recipes.load(moved)
    assert again.shards() == recipe.shards()
    assert again.stages == recipe.stages
    assert again.resolved() == recipe.resolved()


def test_digest_does_not_depend_on_where_the_recipe_lies(recipe_file: Path, tmp_path: Path) -> None:
    before = recipes.load(recipe_file, ["stages.nudge.words=classes.json"]).sha256
    other = tmp_path.rename(tmp_path.with_name("moved"))
    after = recipes.load(other / "recipe.yaml", ["stages.nudge.words=classes.json"]).sha256
    assert before == after
    assert recipes.load(other / "recipe.yaml", ["seed=1"]).sha256 != after
