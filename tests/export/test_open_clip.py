"""Our folder opens in open_clip itself, and comes back as it went."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from timm.models import _registry
from timm.models.vision_transformer import VisionTransformer

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.fold import fold
from compress.model import ClipModel, initialise_
from compress.sources import _open_clip, folder
from compress.stages.inherit import Config as Inherit
from compress.stages.inherit import VisionShape, run
from compress.work import Work
from export import Unavailable
from export.open_clip import Config, load, write

TEXTS = ["", "a red square", "x" * 80, "Ünïcode", "红色方块", "🟥"]


def before_padding(ids: torch.Tensor) -> list[list[int]]:
    """Each row up to its end mark: a causal tower does not see the rest."""
    return [row[: int(row.argmax()) + 1].tolist() for row in ids]


def test_open_clip_gives_the_same_ids_and_embeddings(clip: Clip, tmp_path: Path) -> None:
    write(clip, Config(precision="fp32"), tmp_path / "out")
    name = f"local-dir:{tmp_path / 'out'}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    ids = open_clip.get_tokenizer(name)(TEXTS)
    assert before_padding(ids) == before_padding(clip.tokenizer(TEXTS))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for theirs, ours in (
            (model.eval().encode_image(pixels), clip.model.encode_image(pixels)),
            (model.encode_text(ids), clip.model.encode_text(clip.tokenizer(TEXTS))),
        ):
            torch.testing.assert_close(F.normalize(theirs), F.normalize(ours), rtol=0, atol=1e-5)


def test_it_comes_back_through_our_own_door(clip: Clip, tmp_path: Path) -> None:
    write(clip, Config(precision="fp32"), tmp_path / "out")
    again = folder.load(tmp_path / "out")
    assert again.model.config == clip.model.config and again.license == clip.license
    assert again.preprocess == clip.preprocess
    for name, value in clip.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert before_padding(again.tokenizer(TEXTS)) == before_padding(clip.tokenizer(TEXTS))


def test_half_precision_halves_the_file_and_stays_near(clip: Clip, tmp_path: Path) -> None:
    for precision in ("fp16", "fp32"):
        write(clip, Config(precision=precision), tmp_path / precision)
    small, large = (
        (tmp_path / p / "open_clip_model.safetensors").stat().st_size for p in ("fp16", "fp32")
    )
    assert small < 0.6 * large
    encoder = load(tmp_path / "fp16")
    tokens = clip.tokenizer(TEXTS)
    with torch.no_grad():
        ours = F.normalize(clip.model.encode_text(tokens), dim=-1)
    assert (encoder.encode_text(tokens) * ours).sum(1).min() > 0.9999


def test_a_shape_that_open_clip_cannot_state_is_refused(work: Work, tmp_path: Path) -> None:
    student = run(work, Inherit(vision=VisionShape(heads=2)), tmp_path).clip
    with pytest.raises(PocketclipError, match=r"vision tower has 2 heads of 8 in a width of 32"):
        write(student, Config(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def vit_tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A network that timm might have, small."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    wanted = {k: kwargs[k] for k in ("num_classes", "global_pool") if k in kwargs}
    return VisionTransformer(**sizes, class_token=False, act_layer="gelu_tanh", **wanted)


VISION: dict[str, dict[str, Any]] = {
    "siglip": {"timm_model_name": "vit_tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
    "convnext": {
        "timm_model_name": "test_convnext",
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "resnet": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64},
    "mobileclip": {
        "timm_model_name": "fastvit_mci0",
        "timm_pool": "avg",
        "timm_proj": None,
        "image_size": 64,
    },
}


def with_tower(clip: Clip, name: str, monkeypatch: pytest.MonkeyPatch) -> Clip:
    """The tiny model with another image tower, as open_clip builds it."""
    monkeypatch.setitem(_registry._model_entrypoints, "vit_tiny_siglip", vit_tiny_siglip)
    text = {"context_length": 16, "vocab_size": 300, "width": 32, "heads": 4, "layers": 2}
    if name == "siglip":
        text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    model_cfg = {
        "embed_dim": 32,
        "text_cfg": text,
        "vision_cfg": {"image_size": 32, **VISION[name]},
    }
    if name == "siglip":
        model_cfg["init_logit_bias"] = -10
    torch.manual_seed(0)
    model = ClipModel(_open_clip.config(model_cfg, name))
    initialise_(model)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    side = model.config.vision.image_size
    preprocess = clip.preprocess.model_copy(update={"size": (side, side)})
    return fold(replace(clip, model=model.eval(), preprocess=preprocess))


@pytest.mark.parametrize("name", ["siglip", "convnext", "resnet"])
def test_towers_that_open_clip_builds_open_there(
    name: str, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = with_tower(clip, name, monkeypatch)
    write(ours, Config(precision="fp32"), tmp_path / "out")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    side = ours.preprocess.size[0]
    pixels, ids = torch.randn(2, 3, side, side), ours.tokenizer(TEXTS)
    with torch.no_grad():
        for found, wanted in (
            (theirs.eval().encode_image(pixels), ours.model.encode_image(pixels)),
            (theirs.encode_text(ids), ours.model.encode_text(ids)),
        ):
            torch.testing.assert_close(F.normalize(found), F.normalize(wanted), rtol=0, atol=1e-5)
    assert folder.load(tmp_path / "out").model.config == ours.model.config


def test_folded_branches_are_refused(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PocketclipError, match=r"fastvit_mci0's training branches are folded"):
        write(with_tower(clip, "mobileclip", monkeypatch), Config(), tmp_path / "out")


def test_a_siglip_shape_that_timm_lacks_is_refused(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = with_tower(clip, "siglip", monkeypatch)
    monkeypatch.delitem(_registry._model_entrypoints, "vit_tiny_siglip")
    with pytest.raises(PocketclipError, match=r"no word for attention pooling; .* timm has no"):
        write(ours, Config(), tmp_path / "out")


def test_a_folder_opens_where_it_is_asked_to(clip: Clip, tmp_path: Path) -> None:
    write(clip, Config(precision="fp32"), tmp_path / "out")
    with pytest.raises(Unavailable, match="opened on cpu or cuda, not on mps"):
        load(tmp_path / "out", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="no CUDA device"):
            load(tmp_path / "out", "cuda")
        return
    tokens = clip.tokenizer(TEXTS)
    found = load(tmp_path / "out", "cuda").encode_text(tokens.cuda())
    assert found.is_cuda
    wanted = load(tmp_path / "out").encode_text(tokens)
    assert (found.cpu() * wanted).sum(1).min() > 0.9999
