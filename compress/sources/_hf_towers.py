"""The dual encoders of transformers as ours: config.json and weights of CLIP, SigLIP and kin.

transformers itself is not needed: its files say what they hold, but for defaults that they leave
out, which stand here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import PocketclipError
from compress.sources import _bert
from compress.structure import ClipConfig, TextConfig, VisionConfig

CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
SIGLIP_TEXT = {**SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64}
SIGLIP_VISION = {**SIGLIP, "image_size": 224, "patch_size": 16, "num_patches": 256}
VISION = {
    "clip": CLIP_VISION,
    "altclip": CLIP_VISION,
    "chinese_clip": CLIP_VISION,
    "siglip": SIGLIP_VISION,
    "siglip2": SIGLIP_VISION,
}
TEXT = {"clip": CLIP_TEXT, "siglip": SIGLIP_TEXT, "siglip2": SIGLIP_TEXT}
SIGMOID = ("siglip", "siglip2")
# The longest text that a BERT-shaped tower is opened for: its tables allow 512, captions need less.
BERT_TOKENS = 77

OUTSIDE = {
    "vision_model.embeddings.class_embedding": "image.class_token",
    "vision_model.embeddings.patch_embedding.weight": "image.patch.weight",
    "vision_model.embeddings.patch_embedding.bias": "image.patch.bias",
    "vision_model.embeddings.position_embedding.weight": "image.position",
    "vision_model.pre_layrnorm": "image.norm_pre",
    "vision_model.post_layernorm": "image.norm_post",
    "vision_model.head.attention.out_proj": "image.pool.out",
    "vision_model.head.layernorm": "image.pool.norm",
    "vision_model.head.mlp.fc1": "image.pool.mlp.up",
    "vision_model.head.mlp.fc2": "image.pool.mlp.down",
    "visual_projection": "image.projection",
    "text_model.embeddings.token_embedding.weight": "text.token.weight",
    "text_model.embeddings.position_embedding.weight": "text.position",
    "text_model.final_layer_norm": "text.norm_final",
    "text_model.head": "text.projection",
    "text_projection": "text.projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers?\.(\d+)\.(.+)\.(weight|bias)")
INSIDE = {
    "layer_norm1": "norm1",
    "self_attn.out_proj": "attention.out",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
QKV = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
UNUSED = re.compile(r".*\.position_ids|.*\.token_type_ids|text_model\.(roberta\.)?pooler\..*")
PROBE = "vision_model.head."


def kind_of(config: Mapping[str, Any], source: Path | str) -> str:
    """The family that a config.json states; PocketclipError for one that isn't a dual encoder."""
    kind = str(config.get("model_type"))
    if kind not in VISION:
        raise PocketclipError(
            f"{source}: model_type {kind!r} is not supported; there are {', '.join(VISION)}"
        )
    return kind


def structure(config: Mapping[str, Any], source: Path | str) -> ClipConfig:
    """A config.json of transformers as our structure."""
    kind = kind_of(config, source)
    vision = _filled(VISION[kind], config, "vision_config")
    sigmoid = kind in SIGMOID
    embed_dim = vision["hidden_size"] if sigmoid else config.get("projection_dim", 512)
    if kind == "altclip":
        embed_dim = config.get("projection_dim", 768)
    return ClipConfig(
        embed_dim=embed_dim,
        vision=_vision(kind, vision, source),
        text=_text(kind, config, embed_dim, source),
        logit_bias=sigmoid,
    )


def _filled(defaults: Mapping[str, Any], config: Mapping[str, Any], part: str) -> dict[str, Any]:
    found = config.get(part) or {}
    return {**defaults, **{key: value for key, value in found.items() if value is not None}}


def _tower(cfg: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    activation = _bert.ACTIVATIONS.get(cfg["hidden_act"])
    if activation is None:
        raise PocketclipError(
            f"{source}: activation {cfg['hidden_act']!r} is unknown; there are "
            f"{', '.join(_bert.ACTIVATIONS)}"
        )
    layers, heads = cfg["num_hidden_layers"], cfg["num_attention_heads"]
    return {
        "width": cfg["hidden_size"],
        "head_width": cfg["hidden_size"] // heads,
        "heads": (heads,) * layers,
        "mlp_width": (cfg["intermediate_size"],) * layers,
        "activation": activation,
        "layer_norm_eps": cfg["layer_norm_eps"],
    }


def _vision(kind: str, cfg: Mapping[str, Any], source: Path | str) -> VisionConfig:
    tower = _tower(cfg, source)
    if kind not in SIGMOID:
        return VisionConfig(**tower, image_size=cfg["image_size"], patch_size=cfg["patch_size"])
    if not cfg.get("vision_use_head", True):
        raise PocketclipError(f"{source}: not supported yet: SigLIP without its pooling head")
    side = cfg["image_size"]
    if kind == "siglip2":  # any aspect ratio within a number of patches: we take the square one
        side = round(cfg["num_patches"] ** 0.5) * cfg["patch_size"]
    return VisionConfig(
        **tower,
        image_size=side,
        patch_size=cfg["patch_size"],
        pooling="attention",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection="none",
        pool_heads=cfg["num_attention_heads"],
        pool_head_width=tower["head_width"],
        pool_mlp_width=cfg["intermediate_size"],
    )


def _text(kind: str, config: Mapping[str, Any], embed_dim: int, source: Path | str) -> TextConfig:
    if kind not in TEXT:
        hf = encoder(config, source)
        length = min(BERT_TOKENS, hf["max_position_embeddings"] - _bert.offset(hf))
        alt = kind == "altclip"
        settings = _bert.config(hf, length, source)
        extra = {"pooling": "first", "final_norm": alt, "projection_bias": alt}
        return TextConfig.model_validate({**settings, **extra})
    cfg = _filled(TEXT[kind], config, "text_config")
    shared = {
        **_tower(cfg, source),
        "vocab_size": cfg["vocab_size"],
        "context_length": cfg["max_position_embeddings"],
    }
    if kind in SIGMOID:
        return TextConfig(**shared, causal=False, pooling="last", projection_bias=True)
    # Early configs name 2, which was never the end of text; transformers takes the highest id then.
    end_id = cfg["eos_token_id"]
    ranked = end_id in (2, cfg["vocab_size"] - 1)
    pooling: Literal["argmax", "end"] = "argmax" if ranked else "end"
    return TextConfig(**shared, pooling=pooling, end_id=0 if ranked else end_id)


def encoder(config: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """The BERT-shaped text encoder of AltCLIP or ChineseCLIP, with its defaults filled in."""
    names = {"altclip": "altclip_text_model", "chinese_clip": "chinese_clip_text_model"}
    own = config.get("text_config") or {}
    return _bert.described({**own, "model_type": names[config["model_type"]]}, source)


def renamed(
    config: Mapping[str, Any], shape: ClipConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict of transformers under our names; unknown names stay as they are."""
    kind = config["model_type"]
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    bert = {}
    for name, tensor in weights.items():
        block = BLOCK.fullmatch(name)
        owner, _, leaf = name.rpartition(".")
        if UNUSED.fullmatch(name) or name in _FOLDED:
            continue
        if kind not in TEXT and name.startswith("text_model."):
            bert[name.removeprefix("text_model.").removeprefix("roberta.")] = tensor
        elif block and block[3] in QKV:
            tower = {"vision": "image", "text": "text"}[block[1]]
            whole = f"{tower}.blocks.{block[2]}.attention.qkv.{block[4]}"
            parts.setdefault(whole, {})[QKV[block[3]]] = tensor
        elif block and block[3] in INSIDE:
            tower = {"vision": "image", "text": "text"}[block[1]]
            ours[f"{tower}.blocks.{block[2]}.{INSIDE[block[3]]}.{block[4]}"] = tensor
        elif name in OUTSIDE:
            ours[OUTSIDE[name]] = tensor.reshape(()) if name.startswith("logit_") else tensor
        elif owner in OUTSIDE:
            ours[f"{OUTSIDE[owner]}.{leaf}"] = tensor
        else:
            ours[name] = tensor
    for name, three in parts.items():
        ours[name] = torch.cat([three[i] for i in sorted(three)])
    if bert:
        ours |= _bert_weights(config, shape, bert, ours.get("text.projection.weight"))
    return ours | _siglip_weights(kind, shape, weights)


_FOLDED = (
    f"{PROBE}probe",
    f"{PROBE}attention.in_proj_weight",
    f"{PROBE}attention.in_proj_bias",
)


def _siglip_weights(
    kind: str, shape: ClipConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """SigLIP's pooling with its query folded; SigLIP2's patches as a convolution."""
    ours = {}
    if all(name in weights for name in _FOLDED):
        probe, weight, bias = (weights[name].float() for name in _FOLDED)
        weight_q, weight_k, weight_v = weight.chunk(3)
        bias_q, bias_k, bias_v = bias.chunk(3)
        ours["image.pool.query"] = weight_q @ probe.flatten() + bias_q
        ours["image.pool.kv.weight"] = torch.cat([weight_k, weight_v])
        ours["image.pool.kv.bias"] = torch.cat([bias_k, bias_v])
    patches = weights.get("vision_model.embeddings.patch_embedding.weight")
    if kind == "siglip2" and patches is not None and isinstance(shape.vision, VisionConfig):
        side = shape.vision.patch_size
        # Rows are pixels in reading order with their three colours side by side.
        by_pixel = patches.reshape(len(patches), side, side, 3)
        ours["image.patch.weight"] = by_pixel.permute(0, 3, 1, 2)
    return ours


def _bert_weights(
    config: Mapping[str, Any],
    shape: ClipConfig,
    weights: dict[str, Tensor],
    projection: Tensor | None,
) -> dict[str, Tensor]:
    """The encoder, and AltCLIP's two matrices in a row as one."""
    hf = encoder(config, "config.json")
    ours = {}
    for kind in ("weight", "bias"):
        if f"pre_LN.{kind}" in weights:
            ours[f"text.norm_final.{kind}"] = weights.pop(f"pre_LN.{kind}")
    if "transformation.weight" in weights and projection is not None:
        first, bias = weights.pop("transformation.weight"), weights.pop("transformation.bias")
        ours["text.projection.weight"] = projection.float() @ first.float()
        ours["text.projection.bias"] = projection.float() @ bias.float()
    return ours | _bert.renamed(weights, hf, shape.text.context_length)
