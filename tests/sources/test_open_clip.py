"""open_clip's models as ours, against open_clip itself; random weights, nothing is fetched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from compress import plugin
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipModel
from compress.sources import _open_clip, folder
from compress.sources.open_clip import load

TEXTS = ["", "a photo of a cat", "猫 😀", "Über " * 60]

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {
        "hf_tokenizer_name": "tokenizer",
        "context_length": 12,
        "vocab_size": 320,
        "width": 24,
        "heads": 3,
        "layers": 2,
    },
}
PREPROCESS = {"mean": [0.6, 0.5, 0.4], "std": 0.3, "resize_mode": "squash", "size": 999}


def random_model(model_cfg: dict[str, Any], custom: bool = False) -> nn.Module:
    """open_clip's own module with every weight random, norms and biases included."""
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**model_cfg)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.eval()


@torch.no_grad()
def assert_same_embeddings(theirs: nn.Module, ours: ClipModel, atol: float = 1e-5) -> None:
    """Both towers agree, as they come and at unit length; float32, sums in another order."""
    side, text = ours.config.vision.image_size, ours.config.text
    pixels = torch.randn(2, 3, side, side)
    tokens = torch.randint(1, text.vocab_size - 1, (3, text.context_length))
    tokens[torch.arange(3), torch.tensor([3, 6, text.context_length - 1])] = text.vocab_size - 1
    pairs = [
        (theirs.encode_image(pixels), ours.encode_image(pixels)),
        (theirs.encode_text(tokens), ours.encode_text(tokens.int())),
    ]
    for expected, found in pairs:
        assert expected.std() > 1e-3
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=atol)
        unit, expected_unit = (nn.functional.normalize(x, dim=-1) for x in (found, expected))
        torch.testing.assert_close(unit, expected_unit, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "ViT-B-32-quickgelu"])
def test_named_architectures_embed_as_open_clip(name: str) -> None:
    theirs = open_clip.create_model(name).eval()
    model_cfg = open_clip.get_model_config(name)
    ours = _open_clip.convert(model_cfg, theirs.state_dict(), name)
    assert_same_embeddings(theirs, ours)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"quick_gelu": True},
        {"vision_cfg": {"pool_type": "avg"}},
        {"vision_cfg": {"no_ln_pre": True, "final_ln_after_pool": True, "mlp_ratio": 2.5}},
        {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-2}}},
        {"text_cfg": {"no_causal_mask": True, "pool_type": "last"}},
        {"text_cfg": {"pool_type": "first", "mlp_ratio": 1.5, "norm_kwargs": {"eps": 1e-3}}},
        {"text_cfg": {"pool_type": "eos", "eos_id": 319}},
        {"text_cfg": {"pool_type": "eos", "eos_id": 2}},
        {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
        {"vision_cfg": {"ls_init_value": 0.5}, "text_cfg": {"ls_init_value": 0.5}},
        {"init_logit_bias": -10.0, "nonscalar_logit_scale": True},
    ],
)
@pytest.mark.parametrize("custom", [False, True])
def test_settings_of_plain_towers_embed_as_open_clip(change: dict[str, Any], custom: bool) -> None:
    model_cfg = changed(SMALL, change)
    theirs = random_model(model_cfg, custom)
    assert_same_embeddings(theirs, _open_clip.convert(model_cfg, theirs.state_dict(), "small"))


def test_the_test_sees_a_wrong_activation() -> None:
    theirs = random_model(SMALL)
    ours = _open_clip.convert({**SMALL, "quick_gelu": True}, theirs.state_dict(), "small")
    with pytest.raises(AssertionError):
        assert_same_embeddings(theirs, ours)


def changed(model_cfg: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config with some settings of its towers replaced."""
    merged = {**model_cfg, **change}
    for tower in ("vision_cfg", "text_cfg"):
        merged[tower] = {**model_cfg[tower], **change.get(tower, {})}
    return merged


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"qk_norm": True}}, "qk_norm"),
        ({"vision_cfg": {"attentional_pool": "parallel"}}, "attentional_pool 'parallel'"),
        ({"vision_cfg": {"act_kwargs": {"inplace": True}}}, "act_kwargs"),
        ({"text_cfg": {"scale_fc": True}}, "scale_fc"),
        ({"text_cfg": {"proj_type": "mlp"}}, "proj_type"),
    ],
)
def test_settings_that_no_tower_here_has_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PocketclipError, match="small: not supported yet: ") as refused:
        _open_clip.config(changed(SMALL, change), "small")
    assert words in str(refused.value)


@pytest.fixture
def local_folder(tmp_path: Path) -> Path:
    """A folder in open_clip's format: a small model in half precision with its own tokenizer."""
    path = tmp_path / "small"
    path.mkdir()
    weights = {k: v.half().contiguous() for k, v in random_model(SMALL).state_dict().items()}
    save_file(weights, path / "open_clip_model.safetensors")
    config = {"model_cfg": SMALL, "preprocess_cfg": PREPROCESS, "license": "CC0-1.0"}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=318, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(["a photo of a cat " + "the emoji of the dog"] * 2, trainer)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<end>"}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    return path


def test_local_folder_equals_open_clip(local_folder: Path) -> None:
    pytest.importorskip("transformers")
    name = f"local-dir:{local_folder}"
    theirs, _, transform = open_clip.create_model_and_transforms(name)
    ours = load(name)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    assert ours.tokenizer(TEXTS).tolist() == tokens.tolist()
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    pixels = transform(Image.fromarray(noise))
    torch.testing.assert_close(ours.preprocess(Image.fromarray(noise)), pixels, rtol=0, atol=0)
    with torch.no_grad():
        text = nn.functional.normalize(ours.model.encode_text(ours.tokenizer(TEXTS)), dim=-1)
        expected = theirs.eval().encode_text(tokens, normalize=True)
    torch.testing.assert_close(text, expected, rtol=0, atol=1e-5)
    assert_same_embeddings(theirs.eval(), ours.model)


def test_local_folder_carries_its_licence_and_hash(local_folder: Path) -> None:
    clip = folder.load(local_folder)
    assert (clip.name, clip.license) == ("small", "CC0-1.0")
    assert clip.provenance[0]["step"] == "open_clip" and len(clip.provenance[0]["sha256"]) == 64
    assert str(local_folder.parent) not in json.dumps(clip.provenance)


def test_a_repository_of_the_hub_carries_the_licence_of_its_card(
    local_folder: Path, hub: Callable[[str], Path]
) -> None:
    path = hub("someone/model")
    local_folder.rename(path)
    config = json.loads((path / "open_clip_config.json").read_text())
    del config["license"]
    (path / "open_clip_config.json").write_text(json.dumps(config))
    (path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    clip = plugin.source("hf-hub:someone/model", local_folder.parent)
    assert (clip.name, clip.license) == ("someone/model", "cc-by-nc-4.0")
    assert clip.provenance[0]["research_only"] and clip.provenance[0]["revision"] == path.name


def test_weights_in_a_file_of_a_named_architecture(tmp_path: Path) -> None:
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    save_file(theirs.state_dict(), tmp_path / "own.safetensors")
    training = {
        "epoch": 3,
        "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()},
    }
    torch.save(training, tmp_path / "own.pt")
    for file in ("own.safetensors", "own.pt"):
        clip = load(f"ViT-S-32-alt@{tmp_path / file}")
        assert_same_embeddings(theirs, clip.model)
        assert clip.preprocess.size == (224, 224) and clip.tokenizer.contract.end_id == 49407


def test_random_weights_follow_the_seed() -> None:
    def drawn(seed: int) -> Clip:
        torch.manual_seed(seed)
        return load("ViT-S-32-alt/random")

    first, again, other = (drawn(seed).model.image.position for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("trained_with", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", ["ViT-S-32-alt", "tiny-quickgelu"])
def test_published_weights_decide_the_activation(
    name: str, trained_with: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_cfg = open_clip.get_model_config("ViT-S-32-alt")
    save_file(random_model(model_cfg).state_dict(), tmp_path / "weights.safetensors")
    published = {"file": str(tmp_path / "weights.safetensors"), "mean": (0.1, 0.2, 0.3)}
    published["quick_gelu"] = trained_with == "quick_gelu"
    monkeypatch.setitem(pretrained._PRETRAINED, name, {"tag": published})
    monkeypatch.setitem(
        factory._MODEL_CONFIGS, name, {**model_cfg, "quick_gelu": name.endswith("quickgelu")}
    )
    clip = load(f"{name}/tag")
    assert clip.model.config.vision.activation == clip.model.config.text.activation == trained_with
    assert clip.preprocess.mean == (0.1, 0.2, 0.3) and clip.name == f"{name}/tag"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ViT-B-23/openai", "no architecture 'ViT-B-23'; nearest: .*ViT-B-32"),
        ("ViT-B-32", "no weights named ''; there are openai.*ViT-B-32@FILE"),
        ("ViT-B-32/lion", "no weights named 'lion'; there are openai"),
        ("ViT-B-32@missing.pt", r"missing\.pt: no such file"),
        ("local-dir:missing", r"open_clip_config\.json: no such file"),
        ("mt5-base-ViT-B-32/random", "text encoder 'google/mt5-base' is not supported"),
        ("ViT-B-16-SigLIP/random", "tokenizer timm/ViT-B-16-SigLIP is not .*tokenizer_config"),
    ],
)
def test_wrong_names_get_a_remedy(name: str, words: str) -> None:
    with pytest.raises(PocketclipError, match=words):
        load(name)


def test_an_unreachable_hub_says_what_to_copy_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("no connection\nmany more lines")

    monkeypatch.setattr(pretrained, "hf_hub_download", unreachable)
    with pytest.raises(PocketclipError, match=r"no connection\); without the hub, copy .*laion"):
        load("ViT-B-32/laion2b_s34b_b79k")
    with pytest.raises(PocketclipError, match=r"open_clip_model\.safetensors .*local-dir:FOLDER"):
        load("hf-hub:someone/model")


def test_weights_of_another_shape_are_named(local_folder: Path) -> None:
    config = {"model_cfg": changed(SMALL, {"vision_cfg": {"patch_size": 4}})}
    (local_folder / "open_clip_config.json").write_text(json.dumps(config))
    words = r"image\.position has shape \(17, 32\), the model needs \(65, 32\)"
    with pytest.raises(PocketclipError, match=words):
        folder.load(local_folder)


def test_missing_and_unknown_weights_are_named() -> None:
    weights = random_model(SMALL).state_dict()
    weights["visual.extra"] = weights.pop("visual.ln_post.bias")
    with pytest.raises(PocketclipError, match=r"image\.norm_post\.bias is missing") as refused:
        _open_clip.convert(SMALL, weights, "small")
    assert "visual.extra is unknown" in str(refused.value)


class Hostile:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"state_dict": Hostile(tmp_path / "trace")}, tmp_path / "own.pt")
    with pytest.raises(PocketclipError, match=r"own\.pt: refused, .* use the model's .safetensors"):
        load(f"ViT-B-32@{tmp_path / 'own.pt'}")
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "own.pt", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("file", ["own.pt", "own.safetensors"])
def test_damaged_weights_are_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(PocketclipError, match=file):
        load(f"ViT-B-32@{tmp_path / file}")


def test_a_folder_with_missing_parts_says_which(local_folder: Path) -> None:
    (local_folder / "tokenizer.json").rename(local_folder / "elsewhere.json")
    with pytest.raises(PocketclipError, match=r"tokenizer\.json: no such file"):
        folder.load(local_folder)
    (local_folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(PocketclipError, match="no weights there"):
        folder.load(local_folder)
    (local_folder / "open_clip_config.json").write_text("{")
    with pytest.raises(PocketclipError, match="no weights there"):
        folder.load(local_folder)


def test_a_tokenizer_larger_than_the_text_tower_is_refused(local_folder: Path) -> None:
    smaller = changed(SMALL, {"text_cfg": {"vocab_size": 270}})
    config = {"model_cfg": smaller}
    (local_folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(random_model(smaller).state_dict(), local_folder / "open_clip_model.safetensors")
    with pytest.raises(PocketclipError, match=r"highest id is \d+, the text tower has 270 rows"):
        folder.load(local_folder)
