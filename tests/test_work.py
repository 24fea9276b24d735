"""The data of a recipe: read once, and known by a digest of what a stage may learn from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compress.errors import PocketclipError
from compress.work import Data, read_classes
from tests.tiny import tiny_clip


def test_shards_are_read_once(data: Data) -> None:
    assert data.pairs is data.pairs
    assert data.split("val") is data.split("val")
    assert len(data.pairs.keys) == 8


def test_classes_keep_the_order_of_their_file(data: Data) -> None:
    assert data.classes[:2] == [("red-square", "red square"), ("red-bar", "red bar")]


def test_digest_covers_what_a_stage_learns_from(data: Data, tmp_path: Path) -> None:
    before = data.digest
    assert replace(data).digest == before
    assert replace(data, templates=("{}",)).digest != before
    assert replace(data, image_size=16).digest != before
    assert replace(data, classes_file=None).digest != before
    (tmp_path / "pictures" / "red-bar.json").write_text('{"caption": "a bar"}')
    assert replace(data).digest != before


def test_training_images_are_as_large_as_the_model_takes(data: Data) -> None:
    unsized, clip = replace(data, image_size=None), tiny_clip()
    assert unsized.sized_for(clip).pairs.images.shape[-1] == clip.preprocess.size[0] != 24
    assert replace(data, image_size=24).sized_for(clip).pairs.images.shape[-1] == 24


def test_what_training_keeps_in_memory_does_not_change_what_is_measured(data: Data) -> None:
    smaller = replace(data, image_size=8)
    assert smaller.evaluation_digest == data.evaluation_digest
    assert smaller.split("val").image(0).size == data.split("val").image(0).size == (32, 32)


def test_evaluation_splits_count_for_accuracy_only(data: Data) -> None:
    more = replace(data, evaluate={**data.evaluate, "again": data.train})
    assert more.digest == data.digest
    assert more.evaluation_digest != data.evaluation_digest
    renamed = replace(data, evaluate={"other": data.train})
    assert renamed.evaluation_digest != data.evaluation_digest


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Data().pairs, r"data\.train: this recipe names no shards"),
        (lambda: Data().classes, r"data\.classes: zero-shot accuracy needs"),
        (lambda: Data(evaluate={"a": ()}).split("b"), r"no such split \(the recipe has: a\)"),
    ],
)
def test_missing_data_names_the_key_of_the_recipe(
    action: Callable[[], object], message: str
) -> None:
    with pytest.raises(PocketclipError, match=message):
        action()


def test_bad_class_file_names_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text('[{"concept": "a", "name": "b"}, {"concept": "a"}]')
    with pytest.raises(PocketclipError, match=r"classes\.json\[1\]: each class needs"):
        read_classes(path)
    path.write_text("{")
    with pytest.raises(PocketclipError, match="not a readable JSON class file"):
        read_classes(path)


def test_template_captions_add_the_prompts_to_training_only(data: Data) -> None:
    data = replace(data, templates=("{}", "an emoji of {}"))
    more = replace(data, template_captions=True)
    name = data.pairs.names[0]
    assert more.pairs.captions[0] == list(
        dict.fromkeys([*data.pairs.captions[0], name, f"an emoji of {name}"])
    )
    split = next(iter(data.evaluate))
    assert more.split(split).captions == data.split(split).captions
    assert more.digest != data.digest
