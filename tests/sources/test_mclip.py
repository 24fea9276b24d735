"""Multilingual text towers as ours, against transformers' encoders with a mean and a layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_clip
from torch import Tensor

from benchmarks.experiments.model_files import EMBED, m_clip, sentence_transformer
from compress import clip as clips
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.sources import folder, mclip

transformers = pytest.importorskip("transformers")

GOLDEN = ["", "a photo of a cat", "word " * 100, "crème brûlée", "一只猫坐在垫子上", "👩‍🚀 🚀"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the CLIP whose image tower is used; its embeddings have 16 numbers."""
    path = tmp_path_factory.mktemp("image") / "clip"
    clips.save(tiny_clip(embed_dim=EMBED), path)
    return path


def same(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max()
    assert expected.std() > 1e-3
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=3e-6)


@torch.no_grad()
@pytest.mark.parametrize(("write", "length"), [(m_clip, 38), (sentence_transformer, 24)])
def test_texts_embed_as_upstream_and_pictures_as_before(
    write: Any, length: int, image: Path, tmp_path: Path
) -> None:
    theirs = write(tmp_path / "texts")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}")
    beside: Clip = folder.load(image)
    tokens = ours.tokenizer(GOLDEN)
    assert tokens.shape[1] == length
    same(ours.model.encode_text(tokens), theirs(tokens))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.model.encode_image(pixels), beside.model.encode_image(pixels))
    assert ours.preprocess == beside.preprocess
    assert [step.get("step") for step in ours.provenance][-1] == "mclip"


@torch.no_grad()
@pytest.mark.parametrize("write", [m_clip, sentence_transformer])
@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_repository_of_the_hub_opens(
    write: Any, place: str, image: Path, hub: Callable[[str], Path]
) -> None:
    path = hub("someone/texts")
    theirs = write(path)
    if place and write is sentence_transformer:
        move_encoder(path, place)
    ours = mclip.load(f"someone/texts+{image}")
    tokens = ours.tokenizer(GOLDEN)
    same(ours.model.encode_text(tokens), theirs(tokens))
    assert ours.provenance[-1]["revision"] == path.name
    assert ours.tokenizer.contract.context_length == (38 if write is m_clip else 24)


def move_encoder(path: Path, place: str) -> None:
    """Put the encoder's files into a folder of their own, as older versions saved them."""
    (path / place).mkdir()
    for file in [file for file in path.iterdir() if file.is_file() and file.name != "modules.json"]:
        file.rename(path / place / file.name)
    modules = json.loads((path / "modules.json").read_text())
    modules[0]["path"] = place
    (path / "modules.json").write_text(json.dumps(modules))


def test_ids_equal_the_tokenizer_of_the_folder(image: Path, tmp_path: Path) -> None:
    m_clip(tmp_path / "texts")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}").tokenizer
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "texts")
    texts = [" ".join(text.split()) for text in GOLDEN]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=38).input_ids
    assert ours(GOLDEN).tolist() == expected


def test_a_saved_folder_opens_again(image: Path, tmp_path: Path) -> None:
    sentence_transformer(tmp_path / "texts")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}")
    clips.save(ours, tmp_path / "ours")
    tokens = ours.tokenizer(GOLDEN)
    again = clips.load(tmp_path / "ours")
    torch.testing.assert_close(again.model.encode_text(tokens), ours.model.encode_text(tokens))


def test_licences_of_both_sides_travel(image: Path, tmp_path: Path) -> None:
    m_clip(tmp_path / "texts")
    (tmp_path / "texts/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    ours = mclip.load(f"{tmp_path / 'texts'}+{image}")
    assert ours.license == "texts: cc-by-nc-4.0; images: Apache-2.0"
    assert ours.provenance[-1]["research_only"]


def test_what_does_not_fit_is_named(image: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    m_clip(texts)
    with pytest.raises(PocketclipError, match="a text tower alone; name the image model"):
        mclip.load(str(texts))
    with pytest.raises(PocketclipError, match=r"texts only; .* mclip:.*texts\+open_clip"):
        folder.load(texts)
    clips.save(tiny_clip(embed_dim=24), tmp_path / "wide")
    with pytest.raises(PocketclipError, match=r"texts become 16 numbers, .* pictures 24"):
        mclip.load(f"{texts}+{tmp_path / 'wide'}")
    config = json.loads((texts / "config.json").read_text())
    (texts / "config.json").write_text(json.dumps({**config, "modelBase": "gpt2"}))
    with pytest.raises(PocketclipError, match=r"'gpt2' \(modelBase\) is not supported"):
        mclip.load(f"{texts}+{image}")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("2_Dense/config.json", {"activation_function": "torch.nn.Tanh"}, "ends in torch.nn.Tanh"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "not supported: pooling_mode"),
        ("modules.json", [{"type": "x.Transformer", "path": ""}], "a text tower beside a CLIP has"),
        ("modules.json", {"a": 1}, "not a list of modules"),
    ],
)
def test_other_layers_are_refused(
    file: str, content: Any, words: str, image: Path, tmp_path: Path
) -> None:
    sentence_transformer(tmp_path / "texts")
    (tmp_path / "texts" / file).write_text(json.dumps(content))
    with pytest.raises(PocketclipError, match=words):
        mclip.load(f"{tmp_path / 'texts'}+{image}")
