"""Pairs in memory are what the shards hold."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.data import pairs
from compress.data.pairs import load_pairs, load_split
from compress.errors import PocketclipError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, color in enumerate([(255, 0, 0, 255), (0, 255, 0, 128), (0, 0, 255, 0)]):
        Image.new("RGBA", (16, 16), color).save(tmp_path / f"{n}.png")
        about = {
            "caption": f"picture {n}",
            "concept": f"c{n}",
            "name": f"name {n}",
            "style": "flat",
            "labels": {"de": f"Bild {n}"},
        }
        (tmp_path / f"{n}.json").write_text(json.dumps(about))
    return tmp_path


def test_pairs_hold_rgba_pixels_and_all_texts(folder: Path) -> None:
    found = load_pairs([folder], 16)
    assert found.images.shape == (3, 4, 16, 16)
    for n in range(3):
        reference = np.asarray(Image.open(folder / f"{n}.png"))
        assert np.array_equal(found.images[n].permute(1, 2, 0).numpy(), reference)
        assert found.image(n).tobytes() == reference.tobytes()
    assert found.keys == ["0", "1", "2"] and found.concepts == ["c0", "c1", "c2"]
    assert found.names[1] == "name 1" and found.styles == ["flat"] * 3
    assert found.captions[2] == ["picture 2"] and found.labels[0] == {"de": "Bild 0"}


def test_concepts_are_none_where_one_is_missing(folder: Path) -> None:
    (folder / "1.json").write_text('{"caption": "no concept"}')
    found = load_pairs([folder], 16)
    assert found.concepts is None and found.names[1] == "no concept"


def test_too_many_images_are_refused_before_decoding(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(pairs, "read_samples", lambda *_: pytest.fail("began to decode"))
    need_gib = 3 * 4 * 16 * 16 / 2**30
    with pytest.raises(PocketclipError, match="3 images of 16 x 16"):
        load_pairs([folder], 16, memory_limit_gib=0.99 * need_gib)


def test_skipped_samples_leave_no_gap(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"broken")
    with pytest.raises(PocketclipError, match=r"1\.png"):
        load_pairs([folder], 16)
    found = load_pairs([folder], 16, bad_samples=1)
    assert found.keys == ["0", "2"] and len(found.images) == 2
    assert found.image(1).getpixel((0, 0))[2] == 255 and "1.png" in found.skipped[0]


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match="no image with a caption"):
        load_pairs([tmp_path], 16)


def test_split_keeps_pictures_at_their_own_size_and_aspect(folder: Path) -> None:
    random = np.random.default_rng(0)
    wide = Image.fromarray(random.integers(0, 256, (20, 50, 4), dtype=np.uint8))
    wide.save(folder / "1.png")
    found = load_split([folder])
    assert len(found) == 3 and len(found.images) == 0
    assert found.image(1).size == (50, 20)
    assert found.image(1).tobytes() == wide.tobytes()
    assert found.captions == load_pairs([folder], 16).captions


def test_split_over_the_limit_names_the_sample(folder: Path) -> None:
    sizes = [(folder / f"{n}.png").stat().st_size for n in range(3)]
    load_split([folder], memory_limit_gib=sum(sizes) / 2**30)
    with pytest.raises(PocketclipError, match="2: the images up to this one need more"):
        load_split([folder], memory_limit_gib=(sum(sizes) - 1) / 2**30)
