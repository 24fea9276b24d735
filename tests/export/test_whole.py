"""Files that take pictures and texts: against the contract's own preprocessing and tokenizer."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from tiny import tiny_clip

from compress.clip import TorchEncoder
from compress.errors import GateFailed, PocketclipError
from compress.preprocess import Preprocess, flatten
from compress.tokenizer import Tokenizer
from export import _goldens, _picture, _strings, _whole
from export._verify import verify
from export.onnxruntime import Config, load, write

ROOT = Path(__file__).parents[2]
SIZES = [(640, 480), (97, 131), (301, 64), (64, 64), (50, 33), (63, 200)]


def picture_graph(preprocess: Preprocess) -> onnxruntime.InferenceSession:
    """A graph that only prepares a picture."""
    shape = [1, 3, *preprocess.size]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("pixels", "out")]
    node = helper.make_node("Identity", ["pixels"], ["out"])
    graph = helper.make_graph([node], "test", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    _picture.attach_(model, preprocess, "pixels")
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("side", [64, 96])
def test_pictures_are_resized_as_pillow_does(mode: str, interpolation: str, side: int) -> None:
    """Within a grey level a pass, and the same nearly everywhere.

    Bilinear has ties: from 64 to 96 pixels its weights are sixths, so that every sixth value lies
    between two grey levels, and Pillow's fixed-point weights decide.
    """
    preprocess = Preprocess(size=(side, side), resize_mode=mode, interpolation=interpolation)
    session, random = picture_graph(preprocess), np.random.default_rng(0)
    std = np.array(preprocess.std)[:, None, None]
    for width, height in SIZES:
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = session.run(None, {"picture": noise})[0][0]
        wanted = _whole.columns_first(preprocess, Image.fromarray(noise)).numpy()
        levels = np.abs(found - wanted) * std * 255
        assert levels.max() < (1.01 if interpolation == "bicubic" else 2.01), (width, height)
        share = 0.005 if interpolation == "bicubic" else 0.12
        assert (levels > 0.5).mean() < share, (width, height)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "whole"
    write(tiny_clip(), Config(takes_pictures=True), folder)
    return folder


def test_a_whole_bundle_verifies_and_says_what_it_takes(bundle: Path) -> None:
    assert min(verify(bundle).values()) > 0.9999
    described = json.loads((bundle / "bundle.json").read_text())
    assert described["image"]["input"]["dtype"] == "uint8"
    assert described["image"]["input"]["shape"] == [None, None, 3]
    assert "in_graph" not in described["text"]["input"]
    assert described["runtime"]["whole"]["image"]["largest_difference_levels"] <= 1.001


def test_pictures_of_any_size_embed_as_in_torch(bundle: Path) -> None:
    clip = tiny_clip()
    session = onnxruntime.InferenceSession(bundle / "image.onnx")
    for seed, size in enumerate([(90, 40), (33, 75), (20, 20)]):
        picture = _goldens.drawing(seed, size)
        found = session.run(None, {"picture": np.asarray(picture)})[0]
        wanted = TorchEncoder(clip).encode_image(clip.preprocess(picture)[None]).numpy()
        assert (found * wanted).sum() > 0.9999


def test_the_tower_alone_still_takes_pixels(bundle: Path) -> None:
    clip, pixels = tiny_clip(), torch.randn(3, 3, 32, 32)
    found = load(bundle).encode_image(pixels)
    wanted = TorchEncoder(clip).encode_image(pixels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_readme_code_runs(bundle: Path) -> None:
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("%") == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resize_mode": "longest"}, "resize_mode longest"),
        ({"interpolation": "lanczos"}, "lanczos is not in the graph"),
    ],
)
def test_what_the_graph_cannot_do_is_refused(
    settings: dict[str, str], words: str, tmp_path: Path
) -> None:
    clip = tiny_clip()
    other = replace(clip, preprocess=clip.preprocess.model_copy(update=settings))
    with pytest.raises(PocketclipError, match=words):
        write(other, Config(takes_pictures=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batches_and_flat_files_take_arrays_only() -> None:
    with pytest.raises(ValueError, match="need batch 1 and format onnx"):
        Config(takes_pictures=True, batch=2)


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """A graph that only tokenizes, run on each text."""
    extensions = pytest.importorskip("onnxruntime_extensions")
    shape = [1, tokenizer.contract.context_length]
    ends = [helper.make_tensor_value_info(n, TensorProto.INT32, shape) for n in ("tokens", "out")]
    node = helper.make_node("Identity", ["tokens"], ["out"])
    graph = helper.make_graph([node], "test", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    _strings.attach_(model, tokenizer, "tokens")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(extensions.get_library_path())
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [session.run(None, {"text": np.array([t], dtype=object)})[0][0].tolist() for t in texts]


def test_texts_get_the_contracts_ids() -> None:
    """The emoji tokenizer, in the way of GPT-2, and OpenAI's."""
    from compress.sources import _text_files, folder

    emoji = folder.load(ROOT / "recipes/emoji/teacher").tokenizer
    texts = [*_goldens.TEXTS, *_goldens.captions()[:20]]
    assert ids_of(emoji, texts) == emoji(texts).tolist()
    openai = _text_files.openai_tokenizer()
    assert ids_of(openai, texts) == openai(texts).tolist()


def test_other_ids_are_reported(tmp_path: Path) -> None:
    """The tiny tokenizer spells bytes without the pairs that the operator needs."""
    pytest.importorskip("onnxruntime_extensions")
    with pytest.raises((GateFailed, PocketclipError)):
        _whole._compared(
            tiny_clip(), "text", tiny_clip().tokenizer(_goldens.TEXTS), torch.zeros(7, 16)
        )


def test_flattened_goldens_are_what_the_file_is_run_on() -> None:
    clip = tiny_clip()
    fed, inside = _whole._fed(clip, "image")
    assert all(one.dtype == np.uint8 and one.shape[2] == 3 for one in fed)
    first = next(iter(_goldens.pictures(clip.preprocess.size).values()))
    assert np.array_equal(fed[0], np.asarray(flatten(first, clip.preprocess.background)))
    assert inside.shape == (7, 3, 32, 32)
