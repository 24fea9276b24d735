"""Families of open_clip as ours, against open_clip's own modules; small random configurations."""

from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from timm.models import _registry
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from compress.errors import PocketclipError
from compress.fold import check_folded, fold
from compress.model import ClipModel, plain_image_tower
from compress.sources import _bert, _open_clip
from compress.structure import TextConfig, UpstreamVision

IMAGE = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 320, "width": 32, "heads": 4, "layers": 2}
SIGLIP_TEXT = {
    **TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
TIMM = {"image_size": 64, "timm_pool": "avg", "timm_proj": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "siglip": {
        "vision_cfg": {"timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": SIGLIP_TEXT,
        "init_logit_bias": -10,
    },
    "siglip-i18n": {
        "vision_cfg": {"timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {**SIGLIP_TEXT, "proj_type": "none"},
    },
    "timm-vit": {
        "vision_cfg": {"timm_model_name": "tiny_vit", "timm_pool": "token", "timm_proj": None},
        "text_cfg": TEXT,
    },
    "clipa": {
        "vision_cfg": {
            **IMAGE,
            "no_ln_pre": True,
            "pool_type": "avg",
            "final_ln_after_pool": True,
        },
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
    },
    "coca": {
        "vision_cfg": {
            **IMAGE,
            "width": 48,
            "attentional_pool": True,
            "attn_pooler_heads": 4,
            "attn_pooler_queries": 5,
        },
        "text_cfg": {**TEXT, "embed_cls": True},
    },
    "mobileclip": {
        "vision_cfg": {**TIMM, "timm_model_name": "fastvit_mci0"},
        "text_cfg": {**TEXT, "no_causal_mask": True},
    },
    "convnext": {
        "vision_cfg": {
            **TIMM,
            "timm_model_name": "test_convnext",
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
    "resnet": {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16},
        "text_cfg": TEXT,
        "quick_gelu": True,
    },
}
# Which of them stay open_clip's modules.
UPSTREAM = ("mobileclip", "convnext", "resnet")


@pytest.fixture(autouse=True)
def _tiny_timm_networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two networks of timm small enough for a test: SigLIP's pooling, and CLIP's class token."""
    shared = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}

    def build(settings: dict[str, Any], kwargs: dict[str, Any]) -> VisionTransformer:
        wanted = {k: kwargs[k] for k in ("num_classes", "global_pool") if k in kwargs}
        return VisionTransformer(**{**shared, **settings, **wanted})

    def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return build({"class_token": False, "act_layer": "gelu_tanh"}, kwargs)

    def tiny_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return build({"pre_norm": True, "init_values": 0.3}, kwargs)

    for network in (tiny_siglip, tiny_vit):
        monkeypatch.setitem(_registry._model_entrypoints, network.__name__, network)
    assert timm.is_model("tiny_siglip")
    yield


def random_(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with every weight and running statistic random."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module.eval()


def texts(config: Any, pad_id: int = 0) -> Tensor:
    """Ids of three texts of different lengths, with an end mark of the highest id."""
    tokens = torch.randint(3, config.vocab_size - 1, (3, config.context_length))
    for row, length in enumerate((2, 5, config.context_length - 1)):
        tokens[row, length] = config.vocab_size - 1
        tokens[row, length + 1 :] = pad_id
    return tokens


@torch.no_grad()
def difference(theirs: Any, ours: ClipModel, pad_id: int = 0) -> dict[str, float]:
    """Largest difference between unit embeddings of both models, image and text."""
    side = ours.config.vision.image_size
    pixels, tokens = torch.randn(2, 3, side, side), texts(ours.config.text, pad_id)
    found = {}
    for tower, value in (("image", pixels), ("text", tokens)):
        expected = getattr(theirs, f"encode_{tower}")(value)
        assert expected.std() > 1e-4
        unit = nn.functional.normalize(getattr(ours, f"encode_{tower}")(value.clone()), dim=-1)
        found[tower] = float((unit - nn.functional.normalize(expected, dim=-1)).abs().max())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_family_embeds_as_open_clip(family: str) -> None:
    model_cfg = {"embed_dim": 32, **FAMILIES[family]}
    theirs = random_(open_clip.CustomTextCLIP(**model_cfg))
    ours = _open_clip.convert(model_cfg, theirs.state_dict(), family)
    assert isinstance(ours.config.vision, UpstreamVision) == (family in UPSTREAM)
    assert max(difference(theirs, ours).values()) < 2e-6
    assert (ours.logit_bias is not None) == ("init_logit_bias" in model_cfg)


HF_TEXT: dict[str, dict[str, Any]] = {
    "xlm-roberta": {
        "model_type": "xlm-roberta",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 20,
        "vocab_size": 320,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
    "m2m_100": {
        "model_type": "m2m_100",
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 8,
        "max_position_embeddings": 20,
        "vocab_size": 320,
        "pad_token_id": 1,
    },
}


@pytest.mark.parametrize("projection", ["mlp", "linear"])
@pytest.mark.parametrize("kind", HF_TEXT)
def test_text_encoders_of_transformers_embed_as_open_clip(
    kind: str, projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    hf = HF_TEXT[kind]
    described = {k: v for k, v in hf.items() if k != "model_type"}
    pooler = "mean_pooler" if kind == "xlm-roberta" else "cls_pooler"
    theirs = HFTextEncoder(
        kind,
        24,
        config=transformers.AutoConfig.for_model(hf["model_type"], **described),
        pooler_type=pooler,
        proj_type=projection,
    )
    if kind == "m2m_100":
        theirs.transformer = theirs.transformer.encoder
    random_(theirs)
    monkeypatch.setitem(_bert.NAMED, kind, hf)
    model_cfg = {
        "embed_dim": 24,
        "vision_cfg": IMAGE,
        "text_cfg": {
            "hf_model_name": kind,
            "hf_proj_type": projection,
            "hf_pooler_type": pooler,
            "context_length": 12,
        },
    }
    config = _open_clip.config(model_cfg, kind)
    state = {f"text.{name}": tensor for name, tensor in theirs.state_dict().items()}
    image = ClipModel(config).state_dict()
    ours = ClipModel(config)
    ours.load_state_dict(
        {k: v for k, v in image.items() if not k.startswith("text.")}
        | _open_clip.renamed(model_cfg, config, state, kind)
    )
    assert isinstance(config.text, TextConfig)
    tokens = texts(config.text, pad_id=1)
    with torch.no_grad():
        expected, found = theirs(tokens), ours.eval().encode_text(tokens.int())
    assert expected.std() > 1e-3
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-6)


def test_padding_of_a_masked_text_changes_nothing() -> None:
    """The embedding of a text is the same in a longer context."""
    shared = {"width": 16, "head_width": 8, "heads": (2,), "mlp_width": (32,)}
    config = TextConfig(
        vocab_size=40, context_length=12, causal=False, pad_id=1, pooling="mean", **shared
    )
    from compress.model import TextTower

    tower = random_(TextTower(config, 8))
    tokens = torch.tensor([[3, 9, 5, 2]])
    padded = torch.cat([tokens, torch.ones(1, 8, dtype=torch.long)], dim=1)
    torch.testing.assert_close(tower(padded), tower(tokens), rtol=0, atol=1e-6)


def test_folding_keeps_the_function_and_is_refused_to_be_forgotten() -> None:
    from tiny import tiny_clip

    from compress.clip import Clip

    model_cfg = {"embed_dim": 32, **FAMILIES["mobileclip"]}
    theirs = random_(open_clip.CustomTextCLIP(**model_cfg))
    tiny = tiny_clip()
    model = _open_clip.convert(model_cfg, theirs.state_dict(), "mobileclip")
    clip = Clip(model, tiny.preprocess, tiny.tokenizer, "small", "none")
    with pytest.raises(PocketclipError, match="fastvit_mci0 still has the branches"):
        check_folded(clip)
    folded = fold(clip)
    check_folded(folded)
    assert fold(folded) is folded and folded.provenance[-1] == {"step": "fold"}
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = clip.model.encode_image(pixels), folded.model.encode_image(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    num_params = [sum(p.numel() for p in c.model.image.parameters()) for c in (clip, folded)]
    assert num_params[1] < num_params[0]
    texts = (clip.model.text.parameters(), folded.model.text.parameters())
    assert all(mine is theirs for mine, theirs in zip(*texts, strict=True)), "text is held twice"


def test_structural_stages_refuse_other_towers_by_name() -> None:
    model_cfg = {"embed_dim": 32, **FAMILIES["mobileclip"]}
    model = ClipModel(_open_clip.config(model_cfg, "small"))
    words = "prune_tokens needs a ViT image tower; this is fastvit_mci0"
    with pytest.raises(PocketclipError, match=words):
        plain_image_tower(model, "prune_tokens")
