"""One export by command: settings, the folder it writes, its mistakes."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_clip

import compress.clip
from compress.errors import PocketclipError
from compress.export_command import export


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    compress.clip.save(tiny_clip(), tmp_path / "model")
    return tmp_path / "model"


def test_writes_a_bundle_beside_others_of_the_model(model: Path) -> None:
    folder = export("model", "open_clip", ["precision=fp32"], None)
    assert folder == Path("bundles/tiny/open_clip-fp32")
    bundle = json.loads((folder / "bundle.json").read_text())
    assert (bundle["target"], bundle["precision"]) == ("open_clip", "fp32")


def test_writes_where_it_is_told(model: Path) -> None:
    assert export(str(model), "open_clip", None, Path("deep/er/out")) == Path("deep/er/out")
    assert Path("deep/er/out/bundle.json").is_file()


def test_static_integers_are_calibrated_on_photos_that_have_no_captions(model: Path) -> None:
    photos = model.parent / "photos"
    photos.mkdir()
    for n in range(4):
        Image.new("RGB", (30, 40), (60 * n, 255 - 60 * n, 90)).save(photos / f"IMG_{n}.jpg")
    settings = ["precision=int8-static", "min_cosine=-1"]
    found = export("model", "onnxruntime", settings, Path("mine"), [photos])
    told = json.loads((found / "bundle.json").read_text())["runtime"]["calibration"]
    assert (told["source"], told["num_images"]) == ("training pictures", 4)
    with pytest.raises(PocketclipError, match="no-such-folder"):
        export("no-such-model", "onnxruntime", settings, None, [Path("no-such-folder")])


@pytest.mark.parametrize(
    ("target", "setting", "message"),
    [
        ("open_clop", "precision=fp32", r"did you mean 'open_clip'"),
        ("open_clip", "precision=fp12", r"precision: input should be 'fp16' or 'fp32'"),
        ("open_clip", "precisio=fp16", r"unknown key, did you mean 'precision'"),
        ("open_clip", "precision", r"write it as place=value"),
    ],
)
def test_mistakes_are_named(model: Path, target: str, setting: str, message: str) -> None:
    with pytest.raises(PocketclipError, match=message):
        export("model", target, [setting], None)
