"""Folders of transformers as ours, against transformers itself; small random models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from benchmarks.experiments.model_families import patches
from compress.errors import PocketclipError
from compress.sources import folder, huggingface

transformers = pytest.importorskip("transformers")

GOLDEN = [
    "",
    "a photo of a cat",
    "word " * 100,
    "crème brûlée, naïve façade",
    "一只猫坐在垫子上",
    "👩‍🚀 🚀 ❤️‍🔥",
    "A  Photo_of\tTHE dog's (two) bowls!",
]
CORPUS = [*GOLDEN, "the emoji of a dog and a cat", "une photo d'un chat", "猫的照片"]

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
BERT = {**TOWER, "vocab_size": 400, "max_position_embeddings": 40, "type_vocab_size": 2}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": (
        "CLIPModel",
        {
            "text_config": {
                **TOWER,
                "vocab_size": 400,
                "max_position_embeddings": 20,
                "eos_token_id": 1,
            },
            "vision_config": VISION,
            "projection_dim": 24,
        },
    ),
    "siglip": (
        "SiglipModel",
        {
            "text_config": {**TOWER, "vocab_size": 400, "max_position_embeddings": 16},
            "vision_config": VISION,
        },
    ),
    "siglip2": (
        "Siglip2Model",
        {
            "text_config": {**TOWER, "vocab_size": 400, "max_position_embeddings": 16},
            "vision_config": {**TOWER, "patch_size": 8, "num_patches": 16},
        },
    ),
    "chinese_clip": (
        "ChineseCLIPModel",
        {"text_config": BERT, "vision_config": VISION, "projection_dim": 24},
    ),
    "altclip": (
        "AltCLIPModel",
        {
            "text_config": {**BERT, "pad_token_id": 1, "project_dim": 28, "type_vocab_size": 1},
            "vision_config": VISION,
            "projection_dim": 24,
        },
    ),
}
POSITION = "vision_model.embeddings.position_embedding.weight"
PROCESSORS = {
    "clip": "clip.image_processing_pil_clip.CLIPImageProcessorPil",
    "siglip": "siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
}


def tokenizer(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer of the family's kind: byte BPE, sentence pieces or word pieces."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    if kind == "chinese_clip":
        special = ["[PAD]", "[SEP]", "[CLS]", "[UNK]"]
        found = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        found.normalizer = normalizers.BertNormalizer()
        found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=390, special_tokens=special)
    elif kind == "clip":
        found = tokenizers.Tokenizer(models.BPE())
        found.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=390, special_tokens=special, initial_alphabet=alphabet
        )
    else:
        found = tokenizers.Tokenizer(models.Unigram())
        found.normalizer = normalizers.NFKC()
        found.pre_tokenizer = pre_tokenizers.Metaspace()
        if kind == "altclip":
            special = ["<s>", "<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=390, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    trainer.show_progress = False
    found.train_from_iterator(CORPUS, trainer)
    end, start = (special[i] for i in ((2, 0) if kind == "altclip" else (1, 2)))
    marks = [start, end] if kind not in ("siglip", "siglip2") else [end]
    single = f"{start} $A {end}" if len(marks) == 2 else f"$A {end}"
    found.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(mark, found.token_to_id(mark)) for mark in marks]
    )
    return found


def settings(kind: str) -> dict[str, Any]:
    pad = "[PAD]" if kind == "chinese_clip" else "<pad>"
    return {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}


def saved(kind: str, path: Path) -> nn.Module:
    """A folder as transformers writes it, of a model whose every weight is random."""
    name, config = SMALL[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.numel() > 1:
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    path.mkdir(parents=True)
    model.save_pretrained(path)
    tokenizer(kind).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings(kind)))
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    pictures = {
        "size": {"height": 32, "width": 32} if "siglip" in kind else {"shortest_edge": 32},
        "resample": 3,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.3, 0.2, 0.25],
        **({} if "siglip" in kind else crop),
    }
    (path / "preprocessor_config.json").write_text(json.dumps(pictures))
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return model


@pytest.fixture(params=list(SMALL))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def test_both_towers_embed_as_transformers(kind: str, tmp_path: Path) -> None:
    theirs: Any = saved(kind, tmp_path / "small")
    ours = folder.load(tmp_path / "small")
    pixels = torch.randn(3, 3, 32, 32)
    inputs = patches(pixels, 8) if kind == "siglip2" else {"pixel_values": pixels}
    tokens = ours.tokenizer(GOLDEN)
    mask = (tokens != ours.tokenizer.contract.pad_id).long()
    masked = {} if "siglip" in kind else {"attention_mask": mask}
    pairs = [
        (pooled(theirs.get_image_features(**inputs)), ours.model.encode_image(pixels)),
        (
            pooled(theirs.get_text_features(input_ids=tokens.long(), **masked)),
            ours.model.encode_text(tokens),
        ),
    ]
    for expected, found in pairs:
        assert expected.std() > 1e-3
        scale = expected.abs().max()
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=3e-6)
    torch.testing.assert_close(ours.model.logit_scale, theirs.logit_scale.reshape(()))
    assert ours.license == "apache-2.0" and not ours.provenance[0]["research_only"]


def test_token_ids_equal_transformers(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "small")
    ours = folder.load(tmp_path / "small").tokenizer
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "small")
    length = ours.contract.context_length
    # The contract collapses white space first, which sentence pieces would see.
    texts = [" ".join(text.split()) for text in GOLDEN]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=length).input_ids
    assert ours(GOLDEN).tolist() == expected


@pytest.mark.parametrize("kind", ["clip", "siglip"], indirect=True)
@pytest.mark.parametrize("size", [(70, 50), (41, 64), (33, 32), (20, 20)])
def test_pixels_equal_transformers(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    module, _, name = f"transformers.models.{PROCESSORS[kind]}".rpartition(".")
    saved(kind, tmp_path / "small")
    ours = folder.load(tmp_path / "small").preprocess
    theirs = getattr(__import__(module, fromlist=[name]), name).from_pretrained(tmp_path / "small")
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = theirs(picture, return_tensors="pt").pixel_values[0]
    # Their rescale multiplies by 1/255 in float64, ours divides in float32.
    torch.testing.assert_close(ours(picture), expected, rtol=0, atol=1e-6)


def test_siglip_texts_are_canonicalised(tmp_path: Path) -> None:
    saved("siglip", tmp_path / "small")
    config = {**settings("siglip"), "tokenizer_class": "SiglipTokenizer"}
    (tmp_path / "small" / "tokenizer_config.json").write_text(json.dumps(config))
    ours = folder.load(tmp_path / "small").tokenizer
    assert ours(["A photo, of (two) cat's!"]).equal(ours(["a photo of two cats"]))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "small"
    saved("clip", path)
    for file, words in (
        ("model.safetensors", "no weights there; put model.safetensors"),
        ("tokenizer.json", r"tokenizer\.json: no such file; copy tokenizer\.json and"),
        ("preprocessor_config.json", r"preprocessor_config\.json: no such file; a folder of"),
    ):
        (path / file).rename(path / "elsewhere")
        with pytest.raises(PocketclipError, match=words):
            huggingface.load(str(path))
        (path / "elsewhere").rename(path / file)
    (path / "tokenizer.json").unlink()
    (path / "vocab.txt").touch()
    with pytest.raises(PocketclipError, match=r"there is vocab\.txt: make it with transformers"):
        huggingface.load(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava"}, "model_type 'llava' is not supported; there are clip"),
        ({"vision_config": {**VISION, "hidden_act": "mish"}}, "activation 'mish' is unknown"),
        ({"projection_dim": 12}, "projection.weight has shape"),
    ],
)
def test_a_config_of_another_kind_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    saved("clip", tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PocketclipError, match=words):
        huggingface.load(str(tmp_path / "small"))


def test_a_repository_of_pickled_weights_opens_with_licence_and_revision(
    hub: Callable[[str], Path],
) -> None:
    """AltCLIP and ChineseCLIP were published so; safetensors are taken where there are any."""
    path = hub("someone/model")
    saved("clip", path)
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    clip = huggingface.load("someone/model")
    assert (clip.name, clip.license) == ("someone/model", "apache-2.0")
    assert clip.provenance[0]["revision"] == path.name
    assert torch.equal(clip.model.state_dict()["image.position"], state[POSITION])
    save_file({**state, POSITION: state[POSITION] + 1}, path / "model.safetensors")
    clip = huggingface.load("someone/model")
    assert torch.equal(clip.model.state_dict()["image.position"], state[POSITION] + 1)


def test_an_unreachable_hub_says_what_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> Callable[..., str]:
        raise OSError("no connection\nmore lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(PocketclipError, match=r"no connection\); without the hub, copy config"):
        huggingface.load("someone/model")
