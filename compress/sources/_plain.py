"""open_clip's own vision and text transformers as ours: structure and names, there and back."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.structure import Activation, TextConfig, VisionConfig

# Scalars that OpenAI's files keep among the weights, and masks of early open_clip versions.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")

OUTSIDE_BLOCKS = {
    "visual.conv1.weight": "image.patch.weight",
    "visual.class_embedding": "image.class_token",
    "visual.positional_embedding": "image.position",
    "visual.ln_pre.weight": "image.norm_pre.weight",
    "visual.ln_pre.bias": "image.norm_pre.bias",
    "visual.ln_post.weight": "image.norm_post.weight",
    "visual.ln_post.bias": "image.norm_post.bias",
    "visual.proj": "image.projection.weight",
    "token_embedding.weight": "text.token.weight",
    "positional_embedding": "text.position",
    "cls_emb": "text.class_token",
    "ln_final.weight": "text.norm_final.weight",
    "ln_final.bias": "text.norm_final.bias",
    "text_projection": "text.projection.weight",
    "text_projection.weight": "text.projection.weight",
    "text_projection.bias": "text.projection.bias",
}
INSIDE_BLOCKS = {
    "ln_1": "norm1",
    "attn.in_proj": "attention.qkv",
    "attn.out_proj": "attention.out",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
IN_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
LAYER_SCALE = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.ls_([12])\.gamma")
POOLER = "visual.attn_pool."

# Settings of either tower that make it another network, with the value that leaves it plain.
PLAIN = {
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}


def vision(cfg: Any, embed_dim: int, quick_gelu: bool) -> VisionConfig:
    """open_clip's CLIPVisionCfg, checked by `odd_vision`, as our structure."""
    pooler = bool(cfg.attentional_pool)
    heads = cfg.attn_pooler_heads
    return VisionConfig(
        **_tower(cfg, cfg.width // cfg.head_width, quick_gelu),
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        pooling="attention" if pooler else "class" if cfg.pool_type == "tok" else "mean",
        pre_norm=not cfg.no_ln_pre,
        # After a mean the order of pooling and norm matters; after picking one token it doesn't.
        norm_before_pooling=pooler or cfg.pool_type == "tok" or not cfg.final_ln_after_pool,
        norm_after_pooling=pooler or (cfg.pool_type == "avg" and cfg.final_ln_after_pool),
        pool_heads=heads if pooler else 0,
        pool_head_width=embed_dim // heads if pooler else 0,
        pool_width=embed_dim if pooler else 0,
    )


def text(cfg: Any, embed_dim: int, quick_gelu: bool) -> TextConfig:
    """open_clip's CLIPTextCfg, checked by `odd_text`, as our structure."""
    # The end of text may be found by its rank where no other id is higher.
    ranked = cfg.pool_type == "argmax" or cfg.eos_id == cfg.vocab_size - 1
    return TextConfig(
        **_tower(cfg, cfg.heads, quick_gelu),
        vocab_size=cfg.vocab_size,
        context_length=cfg.context_length,
        pooling={"eos": "argmax" if ranked else "end"}.get(cfg.pool_type, cfg.pool_type),
        end_id=cfg.eos_id if cfg.pool_type == "eos" else 0,
        causal=not cfg.no_causal_mask,
        pad_id=cfg.pad_id if cfg.embed_cls else None,
        class_token=cfg.embed_cls,
        projection="none" if cfg.proj_type == "none" else "linear",
        projection_bias=cfg.proj_bias,
    )


def _tower(cfg: Any, heads: int, quick_gelu: bool) -> dict[str, Any]:
    """The settings that both towers share."""
    activation: Activation = "quick_gelu" if quick_gelu else "gelu"
    if cfg.act_kwargs == {"approximate": "tanh"}:
        activation = "gelu_tanh"
    return {
        "width": cfg.width,
        "head_width": cfg.width // heads,
        "heads": (heads,) * cfg.layers,
        "mlp_width": (int(cfg.width * cfg.mlp_ratio),) * cfg.layers,
        "activation": activation,
        "layer_norm_eps": (cfg.norm_kwargs or {}).get("eps", 1e-5),
    }


def odd_vision(cfg: Any) -> list[str]:
    """The settings of an image tower that our transformer doesn't have."""
    odd = _odd(cfg)
    for key in ("layers", "image_size", "patch_size"):
        if not isinstance(getattr(cfg, key), int):
            odd.append(f"{key} {getattr(cfg, key)}")
    if cfg.pool_type not in ("tok", "avg"):
        odd.append(f"pool_type {cfg.pool_type!r}")
    if isinstance(cfg.attentional_pool, str) or (cfg.attentional_pool and cfg.pool_type != "tok"):
        odd.append(f"attentional_pool {cfg.attentional_pool!r}")
    return odd


def odd_text(cfg: Any) -> list[str]:
    """The settings of a text tower that our transformer doesn't have."""
    odd = _odd(cfg)
    if cfg.pool_type not in ("argmax", "eos", "last", "first"):
        odd.append(f"pool_type {cfg.pool_type!r}")
    if cfg.proj_type not in ("linear", "none"):
        odd.append(f"proj_type {cfg.proj_type!r}")
    return odd


def _odd(cfg: Any) -> list[str]:
    found = {key: getattr(cfg, key, plain) for key, plain in PLAIN.items()}
    odd = [f"{key} {value!r}" for key, value in found.items() if value != PLAIN[key]]
    if cfg.act_kwargs not in (None, {}, {"approximate": "tanh"}):
        odd.append(f"act_kwargs {cfg.act_kwargs}")
    if set(cfg.norm_kwargs or {}) - {"eps"}:
        odd.append(f"norm_kwargs {cfg.norm_kwargs}")
    return odd


def renamed(weights: Mapping[str, Tensor], norm_after_pooling: bool = False) -> dict[str, Tensor]:
    """open_clip's state dict under our names and orientation; unknown names stay as they are."""
    ours, scales = {}, {}
    for name, tensor in weights.items():
        if name in NOT_WEIGHTS or name.startswith(POOLER):
            continue
        scale = LAYER_SCALE.fullmatch(name.removeprefix("text."))
        if scale:
            part = {"1": "attention.out", "2": "mlp.down"}[scale[3]]
            scales[f"{'image' if scale[1] else 'text'}.blocks.{scale[2]}.{part}"] = tensor
            continue
        if name in ("visual.proj", "text_projection", "text.text_projection"):
            tensor = tensor.T
        ours[_our_name(name)] = tensor
    if norm_after_pooling:
        for kind in ("weight", "bias"):
            if f"image.norm_post.{kind}" in ours:
                ours[f"image.norm_pooled.{kind}"] = ours.pop(f"image.norm_post.{kind}")
    pooler = {k.removeprefix(POOLER): v for k, v in weights.items() if k.startswith(POOLER)}
    return {**with_layer_scale(ours, scales), **_pooled(pooler)}


def with_layer_scale(state: dict[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with each scale of a branch [D] folded into the layer that ends the branch."""
    for name, scale in scales.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] * scale.unsqueeze(1)
        state[f"{name}.bias"] = state[f"{name}.bias"] * scale
    return state


def _pooled(pooler: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CoCa's attention pooling: the first query is what becomes the embedding."""
    if not pooler:
        return {}
    query = torch.nn.functional.layer_norm(
        pooler["query"][0].float(),
        pooler["query"].shape[1:],
        pooler["ln_q.weight"].float(),
        pooler["ln_q.bias"].float(),
    )
    bias_q, *bias_kv = pooler["attn.in_proj_bias"].float().chunk(3)
    if "attn.in_proj_weight" in pooler:
        weight_q, weight_k, weight_v = pooler["attn.in_proj_weight"].float().chunk(3)
    else:
        weight_q, weight_k, weight_v = (pooler[f"attn.{p}_proj_weight"].float() for p in "qkv")
    return {
        "image.norm_post.weight": pooler["ln_k.weight"],
        "image.norm_post.bias": pooler["ln_k.bias"],
        "image.pool.query": weight_q @ query + bias_q,
        "image.pool.kv.weight": torch.cat([weight_k, weight_v]),
        "image.pool.kv.bias": torch.cat(bias_kv),
        "image.pool.out.weight": pooler["attn.out_proj.weight"],
        "image.pool.out.bias": pooler["attn.out_proj.bias"],
    }


def _our_name(name: str) -> str:
    """Our name of a weight; the text tower stands under `text.` or at the top."""
    name = name.removeprefix("text.")
    inside = IN_BLOCK.fullmatch(name)
    if inside is None or inside[3] not in INSIDE_BLOCKS:
        return OUTSIDE_BLOCKS.get(name, name)
    tower = "image" if inside[1] else "text"
    return f"{tower}.blocks.{inside[2]}.{INSIDE_BLOCKS[inside[3]]}.{inside[4]}"


def their_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: our state dict under open_clip's names and in its orientation."""
    outside = {
        ours: theirs
        for theirs, ours in OUTSIDE_BLOCKS.items()
        if ".weight" not in theirs or not theirs.startswith("text_projection")
    }
    inside = {ours: theirs for theirs, ours in INSIDE_BLOCKS.items()}
    biased = "text.projection.bias" in state
    theirs = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[1] == "blocks":
            module, kind = ".".join(parts[3:-1]), parts[-1]
            prefix = "visual." if parts[0] == "image" else ""
            joint = "_" if module == "attention.qkv" else "."
            name = f"{prefix}transformer.resblocks.{parts[2]}.{inside[module]}{joint}{kind}"
        elif name == "text.projection.weight" and biased:
            name = "text_projection.weight"
        elif name.endswith("projection.weight"):
            name, tensor = outside[name], tensor.T
        else:
            name = outside.get(name.replace("norm_pooled", "norm_post"), name)
        theirs[name] = tensor
    return theirs
