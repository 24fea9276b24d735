"""Our towers as those of CLIPModel and SiglipModel: their configs, their names of weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.structure import ClipConfig, TextConfig, TowerConfig, UpstreamConfig, VisionConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
SHARED_OUTSIDE = {
    "image.patch": "vision_model.embeddings.patch_embedding",
    "image.position": "vision_model.embeddings.position_embedding.weight",
    "image.norm_post": "vision_model.post_layernorm",
    "text.token": "text_model.embeddings.token_embedding",
    "text.position": "text_model.embeddings.position_embedding.weight",
    "text.norm_final": "text_model.final_layer_norm",
}
OUTSIDE_BLOCKS = {
    "clip": {
        **SHARED_OUTSIDE,
        "image.class_token": "vision_model.embeddings.class_embedding",
        "image.norm_pre": "vision_model.pre_layrnorm",  # their spelling
        "image.projection": "visual_projection",
        "text.projection": "text_projection",
    },
    "siglip": {
        **SHARED_OUTSIDE,
        "image.pool.out": "vision_model.head.attention.out_proj",
        "image.pool.norm": "vision_model.head.layernorm",
        "image.pool.mlp.up": "vision_model.head.mlp.fc1",
        "image.pool.mlp.down": "vision_model.head.mlp.fc2",
        "text.projection": "text_model.head",
    },
}
INSIDE_BLOCKS = {
    "norm1": "layer_norm1",
    "attention.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}

# What the two classes always are, setting by setting.
PLAIN_TOWER = {"post_norm": False}
NO_NORM_AFTER = {"norm_before_pooling": True, "norm_after_pooling": False, "reduction": None}
PLAIN_TEXT = {
    "pad_id": None,
    "embedding_norm": False,
    "final_norm": True,
    "class_token": False,
    "mixer_kernel": 0,
    "projection": "linear",
}
PLAIN: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "vision": {
            **NO_NORM_AFTER,
            "projection": "linear",
            "projection_bias": False,
            "pooling": "class",
            "class_token": True,
            "pre_norm": True,
            "patch_bias": False,
        },
        "text": {**PLAIN_TEXT, "projection_bias": False, "causal": True},
    },
    "siglip": {
        "vision": {
            **NO_NORM_AFTER,
            "projection": "none",
            "pooling": "attention",
            "class_token": False,
            "pre_norm": False,
            "patch_bias": True,
        },
        "text": {**PLAIN_TEXT, "projection_bias": True, "pooling": "last", "causal": False},
    },
}
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}


def kind(model: ClipConfig) -> str:
    """Which of the two a model might be: SigLIP has a bias of the logits."""
    return "siglip" if model.logit_bias else "clip"


def config(clip: Clip) -> dict[str, Any]:
    """config.json as data; PocketclipError naming everything that their class doesn't have."""
    model, contract = clip.model.config, clip.tokenizer.contract
    name = kind(model)
    odd = [*_unlike(model), *(_unlike_clip_text(clip) if name == "clip" else ())]
    if odd:
        raise PocketclipError(f"huggingface: not the shape of a {CLASSES[name]}: {'; '.join(odd)}")
    vision, text = model.vision, model.text
    assert isinstance(vision, VisionConfig) and isinstance(text, TextConfig)
    width = {"projection_dim" if name == "clip" else "projection_size": model.embed_dim}
    end_id = text.end_id if text.pooling == "end" else contract.end_id
    marks = {"bos": contract.start_id, "eos": end_id, "pad": contract.pad_id}
    return {
        "architectures": [CLASSES[name]],
        "model_type": name,
        **({"projection_dim": model.embed_dim} if name == "clip" else {}),
        **({"logit_scale_init_value": clip.model.logit_scale.item()} if name == "clip" else {}),
        "vision_config": {
            **_tower(vision),
            **(width if name == "clip" else {}),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            **_tower(text),
            **width,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            **{f"{mark}_token_id": number for mark, number in marks.items()},
        },
    }


def state(clip: Clip) -> Iterator[tuple[str, Tensor]]:
    """The weights under their names; q, k and v apart."""
    outside = OUTSIDE_BLOCKS[kind(clip.model.config)]
    weights = clip.model.state_dict()
    for name, value in weights.items():
        parts = name.split(".")
        if name.startswith(("image.pool.query", "image.pool.kv")):
            continue
        if parts[1:2] != ["blocks"]:
            yield _their_name(name, outside), _scalar(name, value, clip)
            continue
        tower = "vision_model" if parts[0] == "image" else "text_model"
        layer, module, leaf = f"{tower}.encoder.layers.{parts[2]}", ".".join(parts[3:-1]), parts[-1]
        if module == "attention.qkv":
            for letter, part in zip("qkv", value.chunk(3)):
                yield f"{layer}.self_attn.{letter}_proj.{leaf}", part
        else:
            yield f"{layer}.{INSIDE_BLOCKS[module]}.{leaf}", value
    if "image.pool.query" in weights:
        yield from _pool(weights)


def _pool(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """SigLIP's pooling: our query is folded, so that theirs stays as it is in their projection."""
    head, query = "vision_model.head", weights["image.pool.query"]
    same = torch.eye(len(query), dtype=query.dtype)
    yield f"{head}.probe", query.view(1, 1, -1)
    kv = weights["image.pool.kv.weight"], weights["image.pool.kv.bias"]
    yield f"{head}.attention.in_proj_weight", torch.cat([same, kv[0]])
    yield f"{head}.attention.in_proj_bias", torch.cat([torch.zeros_like(query), kv[1]])


def _their_name(name: str, outside: Mapping[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    return outside.get(name) or (f"{outside[stem]}.{leaf}" if stem else name)


def _scalar(name: str, value: Tensor, clip: Clip) -> Tensor:
    """SigLIP's logit scale and bias are vectors of one number."""
    alone = name.startswith("logit_") and kind(clip.model.config) == "siglip"
    return value.reshape(1) if alone else value


def _tower(tower: TowerConfig) -> dict[str, Any]:
    """The settings that both towers share."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width[0],
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.heads[0],
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.layer_norm_eps,
    }


def _unlike(model: ClipConfig) -> Iterator[str]:
    """What of a structure their class cannot hold."""
    plain = PLAIN[kind(model)]
    for name, tower in (("vision", model.vision), ("text", model.text)):
        if isinstance(tower, UpstreamConfig):
            yield f"the {name} tower is {tower.name}"
            continue
        if len(set(tower.heads)) > 1 or len(set(tower.mlp_width)) > 1:
            yield f"the {name} tower's layers differ in heads or MLP width"
        elif tower.heads[0] * tower.head_width != tower.width:
            yield (
                f"the {name} tower has {tower.heads[0]} heads of {tower.head_width} in a width of "
                f"{tower.width}"
            )
        for key, value in (PLAIN_TOWER | plain[name]).items():
            found = getattr(tower, key, value)
            if found != value:
                yield f"the {name} tower has {key} {found}, not {value}"
    if model.logit_bias and isinstance(model.vision, VisionConfig):
        yield from _unlike_siglip_pooling(model.vision)


def _unlike_siglip_pooling(vision: VisionConfig) -> Iterator[str]:
    """What of the pooling SiglipModel states by the tower's own numbers."""
    if vision.pooling != "attention":
        return
    theirs = (vision.heads[0], vision.head_width, vision.mlp_width[0], vision.width)
    pool = (vision.pool_heads, vision.pool_head_width, vision.pool_mlp_width, vision.pooled_width)
    if pool != theirs:
        yield f"the pooling has heads, head width, MLP width, width {pool}, the tower {theirs}"


def _unlike_clip_text(clip: Clip) -> Iterator[str]:
    """CLIPModel takes the first end mark, or the highest id where a config calls that mark 2."""
    text, end_id = clip.model.config.text, clip.tokenizer.contract.end_id
    if isinstance(text, UpstreamConfig):
        return
    highest = max(clip.tokenizer.tokenizer.get_vocab(with_added_tokens=True).values())
    if text.pooling not in ("argmax", "end"):
        yield f"the text tower has pooling {text.pooling}, not argmax"
    elif text.pooling == "argmax" and end_id < highest:
        yield f"the end mark {end_id} isn't the tokenizer's highest id, {highest}"
    elif text.pooling == "end" and text.end_id == 2:
        yield "the text tower pools at the id 2, for which CLIPModel takes the highest"
