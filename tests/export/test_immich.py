"""Immich's folder, read as Immich reads it: its file names, its own tokenizing and resizing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_clip
from tokenizers import Tokenizer

from compress.clip import Clip
from compress.errors import PocketclipError
from export import _goldens
from export._verify import verify
from export.immich import Config, write

TEXTS = ["", "A red  square\n", "x" * 80, "Ünïcode", "红色方块", "🟥"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "immich"
    write(tiny_clip(), Config(), folder)
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_bundle_verifies(bundle: Path) -> None:
    assert min(verify(bundle).values()) > 0.9999


def test_texts_embed_as_immich_does_it(bundle: Path, clip: Clip) -> None:
    """White space joined, one text a call, int32 ids under the name `text`, the first output."""
    length = read(bundle / "config.json")["text_cfg"]["context_length"]
    pad = read(bundle / "textual/tokenizer_config.json")["pad_token"]
    tokenizer = Tokenizer.from_file(str(bundle / "textual/tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    run = session(bundle / "textual/model.onnx").run
    with torch.no_grad():
        wanted = F.normalize(clip.model.encode_text(clip.tokenizer(TEXTS)), dim=-1)
    for text, row in zip(TEXTS, wanted):
        ids = np.array([tokenizer.encode(" ".join(text.split())).ids], dtype=np.int32)
        np.testing.assert_allclose(run(None, {"text": ids})[0][0], row, atol=1e-5)


@pytest.mark.parametrize("size", [(90, 40), (33, 75), (32, 32)])
def test_pictures_embed_as_immich_does_it(bundle: Path, clip: Clip, size: tuple[int, int]) -> None:
    """Shortest side, Pillow's filter, a centre crop whose half pixels are cut off."""
    cfg, picture = read(bundle / "visual/preprocess_cfg.json"), _goldens.drawing(3, size)
    side = cfg["size"][0]
    scale = side / min(picture.size)
    scaled = [side if n == min(picture.size) else int(n * scale) for n in picture.size]
    image = picture.resize(tuple(scaled), Image.Resampling[cfg["interpolation"].upper()])
    left, top = (int(n / 2 - side / 2) for n in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    pixels = (pixels - np.float32(cfg["mean"])) / np.float32(cfg["std"])
    run = session(bundle / "visual/model.onnx").run
    found = run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0]
    with torch.no_grad():
        wanted = F.normalize(clip.model.encode_image(clip.preprocess(picture)[None]), dim=-1)[0]
    assert float(wanted.numpy() @ found) > 0.99  # half a pixel may be cut on the other side


def test_padded_preprocessing_is_refused(clip: Clip, tmp_path: Path) -> None:
    padded = replace(clip, preprocess=clip.preprocess.model_copy(update={"resize_mode": "longest"}))
    with pytest.raises(PocketclipError, match="by cropping or squashing"):
        write(padded, Config(), tmp_path / "out")
