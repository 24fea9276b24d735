"""Image towers as open_clip's config states them: its own transformer, timm's by name, upstream."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import PocketclipError
from compress.sources import _plain, _timm_vit
from compress.structure import ClipConfig, TowerConfig, UpstreamVision, VisionConfig
from compress.upstream import build

POOLS = {"attention": "map", "class": "token", "mean": "avg"}


def described(model: ClipConfig) -> dict[str, Any]:
    """`vision_cfg` of a model; PocketclipError where open_clip cannot state its image tower."""
    vision = model.vision
    if isinstance(vision, UpstreamVision):
        if vision.folded:
            raise PocketclipError(
                f"open_clip: {vision.name}'s training branches are folded into one convolution "
                "each, which open_clip cannot build; use the folder of the stage itself"
            )
        cfg: dict[str, Any] = vision.arguments["vision_cfg"]
        return {**cfg, "image_size": vision.image_size}
    odd = _unlike_own(vision)
    if not odd:
        return _own(vision)
    name = timm_name(vision, model.embed_dim)
    if name is None:
        raise PocketclipError(
            f"open_clip: its config has no word for {'; '.join(odd)}, and timm has no network of "
            "this shape; use the folder of the stage itself"
        )
    return _timm(vision, name)


def state(model: ClipConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's weights (`image.`) under open_clip's names."""
    if isinstance(model.vision, UpstreamVision):
        return {name.replace("image.tower.", "visual.", 1): w for name, w in weights.items()}
    if _unlike_own(model.vision):
        return _timm_vit.their_names(weights)
    return _plain.their_names(weights)


def timm_name(vision: VisionConfig, embed_dim: int) -> str | None:
    """timm's name of a network with exactly this structure; None where there is none."""
    import timm

    for name in timm.list_models("vit_*siglip*"):
        if not _may_be(name, vision):
            continue
        upstream = UpstreamVision(
            name=name,
            builder="open_clip",
            arguments={"vision_cfg": _timm(vision, name)},
            image_size=vision.image_size,
        )
        with torch.device("meta"):
            found = _timm_vit.config(build(upstream, embed_dim))
        if found == vision:
            return name
    return None


def _may_be(name: str, vision: VisionConfig) -> bool:
    """Whether the sizes that a network's name states are those of a structure."""
    patch, size = re.search(r"patch(\d+)_", name), re.search(r"_(\d+)$", name)
    stated = ((patch, vision.patch_size), (size, vision.image_size))
    return all(found is None or int(found[1]) == wanted for found, wanted in stated)


def _timm(vision: VisionConfig, name: str) -> dict[str, Any]:
    return {
        "image_size": vision.image_size,
        "timm_model_name": name,
        "timm_pool": POOLS[vision.pooling],
        "timm_proj": vision.projection,
        "timm_proj_bias": vision.projection_bias,
    }


def _own(vision: VisionConfig) -> dict[str, Any]:
    return {
        **tower("vision", vision),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "head_width": vision.head_width,
        "pool_type": "tok" if vision.pooling == "class" else "avg",
        "no_ln_pre": not vision.pre_norm,
        "final_ln_after_pool": vision.norm_after_pooling,
    }


def _unlike_own(vision: VisionConfig) -> list[str]:
    """What open_clip's own vision transformer doesn't have."""
    checks = {
        "attention pooling": vision.pooling == "attention",
        "an image tower without a class token": not vision.class_token,
        "a bias of the patches": vision.patch_bias,
        "two norms around the pooling, or none": vision.norm_before_pooling
        == vision.norm_after_pooling,
        "an image tower without a plain projection": vision.projection != "linear"
        or vision.projection_bias,
        "fewer image tokens on the way": vision.reduction is not None,
        "blocks that normalise their sums": vision.post_norm,
        "relu": vision.activation == "relu",
    }
    return [words for words, found in checks.items() if found]


def tower(name: str, config: TowerConfig) -> dict[str, Any]:
    """The settings that both of open_clip's own towers share; irregular shapes are refused."""
    if len(set(config.heads)) > 1 or len(set(config.mlp_width)) > 1:
        raise PocketclipError(
            f"open_clip: the {name} tower's layers differ in heads or MLP width; open_clip's "
            "config has one number for all, use the folder of the stage itself"
        )
    if config.heads[0] * config.head_width != config.width:
        raise PocketclipError(
            f"open_clip: the {name} tower has {config.heads[0]} heads of {config.head_width} in a "
            f"width of {config.width}; open_clip's heads fill the width"
        )
    return {
        "width": config.width,
        "layers": config.num_layers,
        "mlp_ratio": config.mlp_width[0] / config.width,
        "act_kwargs": {"approximate": "tanh"} if config.activation == "gelu_tanh" else None,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }
