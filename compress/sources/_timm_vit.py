"""timm's VisionTransformer, as open_clip wraps it, as our image tower: SigLIP, DFN, CLIP by timm.

The network is built without weights and asked for its structure, as its name says nothing of it.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from compress.sources._plain import with_layer_scale
from compress.structure import Activation, VisionConfig

NAMES = {
    "trunk.cls_token": "class_token",
    "trunk.pos_embed": "position",
    "trunk.patch_embed.proj": "patch",
    "trunk.norm_pre": "norm_pre",
    "trunk.norm": "norm_post",
    "trunk.fc_norm": "norm_pooled",
    "trunk.head": "projection",
    "head.proj": "projection",
    "trunk.attn_pool.kv": "pool.kv",
    "trunk.attn_pool.proj": "pool.out",
    "trunk.attn_pool.norm": "pool.norm",
    "trunk.attn_pool.mlp.fc1": "pool.mlp.up",
    "trunk.attn_pool.mlp.fc2": "pool.mlp.down",
}
INSIDE = {
    "norm1": "norm1",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "norm2",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
QUERY = ("trunk.attn_pool.latent", "trunk.attn_pool.q.weight", "trunk.attn_pool.q.bias")


def config(tower: nn.Module) -> VisionConfig | None:
    """Structure of a TimmModel; None unless it is a transformer like ours."""
    trunk: Any = tower.trunk
    head: Any = tower.head
    if not _plain(trunk) or set(head._modules) - {"drop", "proj"}:
        return None
    blocks, pool = list(trunk.blocks), trunk.attn_pool
    first = blocks[0]
    linear = isinstance(trunk.head, nn.Linear) or hasattr(head, "proj")
    layer = trunk.head if isinstance(trunk.head, nn.Linear) else getattr(head, "proj", None)
    poolings: dict[str, Literal["class", "mean", "attention"]] = {
        "map": "attention",
        "token": "class",
        "avg": "mean",
    }
    return VisionConfig(
        width=trunk.embed_dim,
        head_width=first.attn.head_dim,
        heads=tuple(block.attn.num_heads for block in blocks),
        mlp_width=tuple(block.mlp.fc1.out_features for block in blocks),
        activation=_activation(first.mlp.act) or "gelu",
        layer_norm_eps=first.norm1.eps,
        projection="linear" if linear else "none",
        projection_bias=layer is not None and layer.bias is not None,
        image_size=trunk.patch_embed.img_size[0],
        patch_size=trunk.patch_embed.patch_size[0],
        pooling=poolings[trunk.global_pool or "token"],
        class_token=trunk.cls_token is not None,
        pre_norm=not isinstance(trunk.norm_pre, nn.Identity),
        patch_bias=trunk.patch_embed.proj.bias is not None,
        norm_before_pooling=not isinstance(trunk.norm, nn.Identity),
        norm_after_pooling=not isinstance(trunk.fc_norm, nn.Identity),
        pool_heads=pool.num_heads if pool is not None else 0,
        pool_head_width=pool.head_dim if pool is not None else 0,
        pool_mlp_width=pool.mlp.fc1.out_features if pool is not None else 0,
    )


def _plain(trunk: Any) -> bool:
    from timm.layers import AttentionPoolLatent, PatchEmbed
    from timm.models import vision_transformer as theirs

    if type(trunk) is not theirs.VisionTransformer or type(trunk.patch_embed) is not PatchEmbed:
        return False
    first: Any = trunk.blocks[0]
    sides = trunk.patch_embed.img_size, trunk.patch_embed.patch_size
    return (
        type(first) is theirs.Block
        and type(first.attn) is theirs.Attention
        and isinstance(first.attn.q_norm, nn.Identity)
        and isinstance(first.mlp.norm, nn.Identity)
        and first.attn.qkv.bias is not None
        and _activation(cast(nn.Module, first.mlp.act)) is not None
        and isinstance(trunk.patch_embed.norm, nn.Identity)
        and all(height == width for height, width in sides)
        and not trunk.num_reg_tokens
        and not trunk.no_embed_class
        and trunk.pos_embed is not None
        and trunk.global_pool in ("map", "token", "avg")
        and (
            trunk.attn_pool is None
            or (type(trunk.attn_pool) is AttentionPoolLatent and trunk.cls_token is None)
        )
    )


def _activation(module: nn.Module) -> Activation | None:
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    known: dict[str, Activation] = {"GELU": "gelu", "GELUTanh": "gelu_tanh"}
    return {**known, "QuickGELU": "quick_gelu"}.get(type(module).__name__)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TimmModel's state dict under our names; unknown names stay as they are, after `visual.`."""
    ours, scales = {}, {}
    for name, tensor in weights.items():
        block = re.fullmatch(r"trunk\.blocks\.(\d+)\.(.+)\.(weight|bias|gamma)", name)
        owner, _, kind = name.rpartition(".")
        if name in QUERY:
            continue
        if block and block[2] in ("ls1", "ls2"):
            part = {"ls1": "attention.out", "ls2": "mlp.down"}[block[2]]
            scales[f"image.blocks.{block[1]}.{part}"] = tensor
        elif block and block[2] in INSIDE:
            ours[f"image.blocks.{block[1]}.{INSIDE[block[2]]}.{block[3]}"] = tensor
        elif name in ("trunk.cls_token", "trunk.pos_embed"):
            rows = tensor.flatten() if name.endswith("token") else tensor.flatten(0, 1)
            ours[f"image.{NAMES[name]}"] = rows
        elif owner in NAMES:
            ours[f"image.{NAMES[owner]}.{kind}"] = tensor
        else:
            ours[f"visual.{name}"] = tensor
    if all(name in weights for name in QUERY):
        latent, weight, bias = (weights[name].float() for name in QUERY)
        ours["image.pool.query"] = torch.mv(weight, latent.flatten()) + bias
    return with_layer_scale(ours, scales)


def their_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: our image tower's weights under TimmModel's names, after `visual.`.

    The pooling's query is folded into what it is projected to, so their projection is the identity.
    """
    outside = {ours: theirs for theirs, ours in NAMES.items() if theirs != "trunk.head"}
    inside = {ours: theirs for theirs, ours in INSIDE.items()}
    theirs = {}
    for name, tensor in state.items():
        parts = name.split(".")
        owner, leaf = ".".join(parts[1:-1]), parts[-1]
        if owner.startswith("blocks."):
            number, module = parts[2], inside[".".join(parts[3:-1])]
            theirs[f"trunk.blocks.{number}.{module}.{leaf}"] = tensor
        elif name == "image.pool.query":
            latent, weight, bias = QUERY
            theirs[latent] = tensor.view(1, 1, -1)
            theirs[weight] = torch.eye(len(tensor), dtype=tensor.dtype)
            theirs[bias] = torch.zeros_like(tensor)
        elif not owner:
            theirs[outside[leaf]] = tensor.reshape(1, -1, tensor.shape[-1])
        else:
            theirs[f"{outside[owner]}.{leaf}"] = tensor
    return {f"visual.{name}": tensor for name, tensor in theirs.items()}
