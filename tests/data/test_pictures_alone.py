"""Photos without captions: `data.captions: none`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_clip
from typer.testing import CliRunner

import compress.clip
from compress import calibrate
from compress import recipe as recipes
from compress.batches import Sampler
from compress.cli import app
from compress.data.pairs import load_pairs
from compress.data.shards import count_samples, digest
from compress.data.stand_ins import SENTENCES
from compress.errors import PocketclipError
from compress.export_command import thinned
from compress.feed import Batches
from compress.stages import distill, exact, quantize
from compress.stream_feed import Stream, StreamedBatches
from compress.work import Data, Work
from export import _gallery
from export._calibration import collect

IMAGE_ALONE = {"towers": ["image"], "affinity": 0, "feature": 5, "teacher": "online"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photos in two folders, a note about them, and one that has a caption."""
    random = np.random.default_rng(0)
    for n in range(6):
        path = tmp_path / "photos" / ("summer", "winter")[n % 2] / f"IMG_{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40, 30 + 10 * n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos/summer/notes.txt").write_text("all of these are from Italy")
    (tmp_path / "photos/summer/IMG_0.txt").write_text("a beach")
    return tmp_path / "photos"


@pytest.fixture
def alone(photos: Path) -> Data:
    return Data(train=(photos,), image_size=32, captions="none")


def test_a_photo_without_a_caption_says_what_to_do(photos: Path) -> None:
    with pytest.raises(PocketclipError, match=r"no caption beside it .*`data\.captions: none`"):
        load_pairs([photos], 16)


def test_every_photo_is_read_and_texts_without_one_are_passed_over(photos: Path) -> None:
    pairs = load_pairs([photos], 16, needs_caption=False)
    assert count_samples([photos]) == 7 and count_samples([photos], needs_caption=False) == 6
    assert len(pairs) == len(pairs.images) == 6 and not pairs.skipped
    assert sorted(pairs.names) == ["IMG_1", "IMG_2", "IMG_3", "IMG_4", "IMG_5", "a beach"]
    (photos / "empty").mkdir()
    with pytest.raises(PocketclipError, match=r"empty: no image \(\.jpg, \.png, \.webp\) in it"):
        load_pairs([photos / "empty"], 16, needs_caption=False)
    (photos / "winter/IMG_1.jpg").write_bytes(b"cut off")
    with pytest.raises(PocketclipError, match=r"IMG_1\.jpg: not a whole image"):
        load_pairs([photos], 16, needs_caption=False)


def test_of_a_large_folder_a_few_photos_are_read_evenly_spread(photos: Path) -> None:
    assert len(thinned([photos], 10)) == 6
    chosen = thinned([photos], 3)
    assert [path.name for path in chosen] == ["IMG_0.jpg", "IMG_4.jpg", "IMG_3.jpg"]
    (photos / "winter/IMG_1.jpg").write_bytes(b"not read")
    pairs = load_pairs(chosen, 16, needs_caption=False)
    assert pairs.names == ["a beach", "IMG_4", "IMG_3"]


def test_images_by_themselves_bring_the_captions_beside_them(photos: Path) -> None:
    pattern = str(photos / "summer/*_0.jpg")
    assert load_pairs([pattern], 16).captions == [["a beach"]]
    before = digest([pattern])
    (photos / "summer/IMG_0.txt").write_text("a lake")
    assert digest([pattern]) != before
    with pytest.raises(PocketclipError, match=r"notes\.txt: not a shard .* an image"):
        load_pairs([photos / "summer/notes.txt"], 16)


def test_texts_stand_in_for_captions_and_none_is_a_photo_s_own(alone: Data, photos: Path) -> None:
    given = [text for own in alone.pairs.captions for text in own]
    assert "a beach" not in given and set(given) <= set(SENTENCES)
    assert all(len(own) == 8 for own in alone.pairs.captions) and len(set(given)) == 13
    classes = photos.parent / "classes.json"
    classes.write_text(
        json.dumps([{"concept": "c", "name": "cat"}, {"concept": "d", "name": "dog"}])
    )
    named = replace(alone, classes_file=classes, templates=("{}", "a {}"))
    assert {text for own in named.pairs.captions for text in own} == {
        "cat", "a cat", "dog", "a dog"
    }  # fmt: skip


def test_the_setting_is_part_of_what_a_stage_depends_on(alone: Data) -> None:
    assert replace(alone, captions="own").digest != alone.digest


def test_both_towers_are_calibrated(alone: Data) -> None:
    clip = replace(tiny_clip(), data=alone)
    pairs = calibrate.draw(clip, alone, 4, 0)
    assert pairs.pixels.shape == (4, 3, 32, 32) and len(pairs.tokens) == 4
    found = collect(clip, 5)
    assert found.source == "training pictures" and len(found.image) == 5


def test_stand_ins_do_not_say_how_long_a_context_must_be(alone: Data, tmp_path: Path) -> None:
    """Nobody's prompts are as long as our sentences, or as short."""
    clip = tiny_clip()
    made = exact.run(Work(clip, clip, alone), exact.Config(classes=False), tmp_path).clip
    assert made.model.config.text.context_length == clip.model.config.text.context_length
    with pytest.raises(PocketclipError, match="neither classes nor training captions"):
        exact.run(Work(clip, clip, alone), exact.Config(vocabulary="data"), tmp_path)


def test_the_image_tower_learns_from_pictures_alone(alone: Data, tmp_path: Path) -> None:
    teacher, clip = tiny_clip(), tiny_clip(seed=1)
    settings = {**IMAGE_ALONE, "steps": 30, "batch_size": 6, "warmup_steps": 1, "lr": 3e-3}
    cfg = distill.Config.model_validate({**settings, "precision": "fp32", "log_every": 1})
    made = distill.run(Work(clip, teacher, alone), cfg, tmp_path).clip
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["feature"] < 0.7 * log[0]["feature"]
    for name, value in clip.model.text.state_dict().items():
        assert torch.equal(made.model.text.state_dict()[name], value), name


def test_pictures_alone_are_ranked_among_the_names_of_the_classes(
    alone: Data, tmp_path: Path
) -> None:
    clip, settings = tiny_clip(), {**IMAGE_ALONE, "bank": 1, "steps": 2, "batch_size": 4}
    cfg = distill.Config.model_validate({**settings, "precision": "fp32", "log_every": 1})
    with pytest.raises(PocketclipError, match=r"with pictures alone its names come from data\.cl"):
        distill.run(Work(clip, clip, alone), cfg, tmp_path / "none")
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps([{"concept": name, "name": name} for name in ("cat", "dog")]))
    named = replace(alone, classes_file=classes)
    feed = Batches(Work(clip, clip, named), cfg, Sampler(named.pairs), tmp_path)
    assert feed.names == ["cat", "dog"]
    distill.run(Work(clip, clip, named), cfg, tmp_path / "some")
    log = (tmp_path / "some/log.jsonl").read_text().splitlines()
    assert "bank" in json.loads(log[0])


def test_a_stream_of_pictures_alone(alone: Data, photos: Path) -> None:
    import tarfile

    with tarfile.open(photos.parent / "photos.tar", "w") as tar:
        for path in sorted(photos.rglob("*.jpg")):
            tar.add(path, path.name)
    clip = tiny_clip()
    stream = Stream.model_validate({})
    cfg = distill.Config.model_validate({**IMAGE_ALONE, "stream": stream, "batch_size": 4})
    data = replace(alone, train=(photos.parent / "photos.tar",))
    batches = StreamedBatches(Work(clip, clip, data), cfg, stream)
    assert batches.at(0).pixels.shape == (4, 3, 32, 32)
    with pytest.raises(PocketclipError, match="no caption beside it"):
        StreamedBatches(Work(clip, clip, replace(data, captions="own")), cfg, stream).at(0)


def test_the_demo_page_searches_a_folder_of_photos(photos: Path, tmp_path: Path) -> None:
    clip, out = tiny_clip(), tmp_path / "page"
    out.mkdir()
    _gallery.write(clip, compress.clip.TorchEncoder(clip), out, emoji=False, extra=photos)
    shown = json.loads((out / "gallery.json").read_text())["pictures"]
    assert [entry["name"] for entry in shown] == [
        "a beach", "IMG_2", "IMG_4", "IMG_1", "IMG_3", "IMG_5"
    ]  # fmt: skip
    assert np.fromfile(out / "gallery.f32", "<f4").shape == (6 * clip.model.config.embed_dim,)


def _recipe(photos: Path, *stages: dict) -> Path:
    compress.clip.save(tiny_clip(), photos.parent / "model")
    path = photos.parent / "recipe.yaml"
    content = {
        "name": "photos",
        "model": "model",
        "data": {"train": ["photos"], "captions": "none"},
        "stages": list(stages),
        "export": [{"onnxruntime": {"precision": "int8", "min_cosine": 0.8}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_stages_that_learn_from_captions_are_refused_all_at_once(photos: Path) -> None:
    path = _recipe(
        photos,
        {"pretrain": {"steps": 2}},
        {"prune_structure": {"keep": 0.5}},
        {"curate": {"score": 0.3}},
        {"curate": {"no_such": 1}},
        {"reinforce": {}},
        {"distill": {"steps": 2}},
        {"distill": {**IMAGE_ALONE, "affinity": 1, "steps": 2}},
        {"distill": {**IMAGE_ALONE, "template_captions": True, "steps": 2}},
        {"quantize": {"fallback": {}}},
    )
    with pytest.raises(PocketclipError) as caught:
        recipes.load(path)
    said = str(caught.value)
    assert said.count("data.captions is none, but") == 8
    for reason in (
        "stages[0].pretrain",
        "stages[8].quantize: data.captions is none",
        "the text tower learns from captions: `towers: [image]`",
        "affinity compares pictures with captions: give it weight 0, and learn by feature",
        "leave `fallback` out",
    ):
        assert reason in said, reason


def test_a_recipe_runs_from_a_folder_of_photos_to_integers(photos: Path) -> None:
    few = {"num_images": 6}
    path = _recipe(
        photos, {"distill": {**IMAGE_ALONE, "steps": 3, "batch_size": 4}}, {"quantize": few}
    )
    out = photos.parent / "run"
    done = CliRunner().invoke(
        app, ["run", str(path), "--out", str(out), "--set", "bench.patience_seconds=0"]
    )
    assert done.exit_code == 0, done.output
    assert (out / "report.html").exists()
    about = json.loads((out / "export/onnxruntime-int8/bundle.json").read_text())
    assert about["parity"]["image"]["worst_cosine"] > 0.8
    assert quantize.needs_captions(quantize.Config.model_validate(few)) is None
