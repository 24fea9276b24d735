"""Our folder opens in transformers itself, with its processor, and its limits are stated."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clip

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipModel, initialise_
from compress.sources import folder
from export import _goldens
from export._verify import verify
from export.huggingface import Config, load, write

transformers = pytest.importorskip("transformers")

TEXTS = ["", "A red  square\n", "x" * 80, "Ünïcode", "红色方块", "🟥"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "huggingface"
    write(tiny_clip(), Config(), folder)
    return folder


def changed(clip: Clip, tower: str, **settings: object) -> Clip:
    """The same kind of model with another structure in one tower."""
    config = clip.model.config
    inner = getattr(config, tower).model_copy(update=settings)
    model = ClipModel(config.model_copy(update={tower: inner}))
    initialise_(model)
    return replace(clip, model=model.eval())


def test_the_bundle_verifies_in_transformers(bundle: Path) -> None:
    assert min(verify(bundle).values()) > 0.9999


def test_clip_model_gives_our_embeddings_and_logits(bundle: Path, clip: Clip) -> None:
    theirs = transformers.CLIPModel.from_pretrained(bundle).eval()
    pixels, tokens = torch.randn(3, 3, 32, 32), clip.tokenizer(TEXTS)
    with torch.no_grad():
        found = theirs(pixel_values=pixels, input_ids=tokens.long())
        images = F.normalize(clip.model.encode_image(pixels), dim=-1)
        texts = F.normalize(clip.model.encode_text(tokens), dim=-1)
        logits = clip.model.logit_scale.exp() * images @ texts.T
    torch.testing.assert_close(found.image_embeds, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_embeds, texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits_per_image, logits, rtol=0, atol=1e-4)


def test_auto_tokenizer_gives_our_ids_up_to_the_end_mark(bundle: Path, clip: Clip) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(bundle)
    found = theirs(TEXTS, padding="max_length", truncation=True)["input_ids"]
    for row, ours in zip(found, clip.tokenizer(TEXTS).tolist()):
        end = ours.index(clip.tokenizer.contract.end_id) + 1
        assert row[:end] == ours[:end]
        assert len(row) == len(ours)


def test_auto_processor_gives_our_pixels(bundle: Path, clip: Clip) -> None:
    """transformers resizes with torch or Pillow by its version: one 8-bit step at mean/std 0.5."""
    theirs = transformers.AutoProcessor.from_pretrained(bundle)
    for seed, size in enumerate([(90, 40), (33, 75), (20, 20)]):
        picture = _goldens.drawing(seed, size)
        found = theirs(images=picture, return_tensors="pt")["pixel_values"][0]
        difference = (found - clip.preprocess(picture)).abs()
        assert difference.max() <= 2 / 255 / 0.5 + 1e-5
        assert np.mean(difference.numpy() > 1e-5) < 0.05


def test_half_precision_halves_the_file_and_stays_near(
    bundle: Path, clip: Clip, tmp_path: Path
) -> None:
    write(clip, Config(precision="fp16"), tmp_path / "out")
    small, large = ((f / "model.safetensors").stat().st_size for f in (tmp_path / "out", bundle))
    assert small < 0.6 * large
    tokens = clip.tokenizer(TEXTS)
    with torch.no_grad():
        ours = F.normalize(clip.model.encode_text(tokens), dim=-1)
    assert (load(tmp_path / "out").encode_text(tokens) * ours).sum(1).min() > 0.9999


@pytest.mark.parametrize(
    ("tower", "settings", "reason"),
    [
        ("vision", {"heads": (2, 2)}, "vision tower has 2 heads of 8 in a width of 32"),
        ("vision", {"mlp_width": (64, 32)}, "vision tower's layers differ"),
        ("vision", {"pooling": "mean"}, "vision tower has pooling mean, not class"),
        ("vision", {"pre_norm": False}, "has pre_norm False"),
        ("vision", {"patch_bias": True}, "has patch_bias True"),
        ("text", {"causal": False}, "text tower has causal False"),
        ("text", {"pooling": "last"}, "text tower has pooling last"),
    ],
)
def test_a_shape_that_clip_model_lacks_is_refused(
    clip: Clip, tmp_path: Path, tower: str, settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(PocketclipError, match=f"not the shape of a CLIPModel: .*{reason}"):
        write(changed(clip, tower, **settings), Config(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_padded_preprocessing_is_refused(clip: Clip, tmp_path: Path) -> None:
    padded = replace(clip, preprocess=clip.preprocess.model_copy(update={"resize_mode": "longest"}))
    with pytest.raises(PocketclipError, match="cannot pad"):
        write(padded, Config(), tmp_path / "out")


def test_a_tower_that_pools_at_its_first_end_mark_stays_so(clip: Clip, tmp_path: Path) -> None:
    """MetaCLIP 2's rule; a second end mark in the text must not become the embedding."""
    ours = changed(clip, "text", pooling="end", end_id=7)
    write(ours, Config(), tmp_path / "out")
    tokens = clip.tokenizer(TEXTS)
    tokens[:, 2], tokens[:, 9] = 7, 7
    with torch.no_grad():
        wanted = F.normalize(ours.model.encode_text(tokens), dim=-1)
    torch.testing.assert_close(
        load(tmp_path / "out").encode_text(tokens), wanted, rtol=0, atol=1e-5
    )


def siglip(clip: Clip, **pool: int) -> Clip:
    """A model of SigLIP's shape: attention pooling, a text tower that sees all, a logit bias."""
    pooling = {"pool_heads": 4, "pool_head_width": 8, "pool_mlp_width": 64, **pool}
    vision = {"pooling": "attention", "class_token": False, "pre_norm": False, "patch_bias": True}
    config = clip.model.config.model_copy(update={"embed_dim": 32, "logit_bias": True})
    made = {
        "vision": config.vision.model_copy(update={**vision, **pooling, "projection": "none"}),
        "text": config.text.model_copy(
            update={"causal": False, "pooling": "last", "projection_bias": True}
        ),
    }
    model = ClipModel(config.model_copy(update=made))
    torch.manual_seed(0)
    initialise_(model)
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            torch.nn.init.normal_(parameter, mean=0.3, std=0.2)
    return replace(clip, model=model.eval())


def test_siglip_model_gives_our_embeddings_and_logits(clip: Clip, tmp_path: Path) -> None:
    ours = siglip(clip)
    write(ours, Config(), tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(theirs).__name__ == "SiglipModel"
    pixels, tokens = torch.randn(3, 3, 32, 32), ours.tokenizer(TEXTS)
    with torch.no_grad():
        found = theirs(pixel_values=pixels, input_ids=tokens.long())
        images = F.normalize(ours.model.encode_image(pixels), dim=-1)
        texts = F.normalize(ours.model.encode_text(tokens), dim=-1)
        logits = ours.model.logit_scale.exp() * images @ texts.T + ours.model.logit_bias
    torch.testing.assert_close(found.image_embeds, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.text_embeds, texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits_per_image, logits, rtol=0, atol=1e-4)
    assert min(verify(tmp_path / "out").values()) > 0.9999


def test_a_siglip_folder_comes_back_through_our_own_door(clip: Clip, tmp_path: Path) -> None:
    ours = siglip(clip)
    write(ours, Config(), tmp_path / "out")
    again = folder.load(tmp_path / "out")
    assert again.model.config == ours.model.config
    for name, value in ours.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_pooling_of_its_own_shape_is_no_siglip_model(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match=r"not the shape of a SiglipModel: the pooling has"):
        write(siglip(clip, pool_mlp_width=48), Config(), tmp_path / "out")
