"""Apple's own MobileCLIP files (.pt): their names as open_clip's.

Both forms occur, with the branches of training and folded; the names tell them apart.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

IMAGE, TEXT = "image_encoder.model.", "text_encoder."
# Apple's name of a part -> open_clip's, in this order.
MIXER = re.compile(r"transformer\.(\d+)\.(token_mixer|convffn|layer_scale)\b.*")
BATCH_NORM_EPS = 1e-5
TEXT_PARTS = (
    ("projection_layer", "text_projection"),
    ("embedding_layer", "token_embedding"),
    ("positional_embedding.pos_embed.pos_embed", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("pre_norm_mha.0", "ln_1"),
    ("pre_norm_mha.1", "attn"),
    ("pre_norm_ffn.0", "ln_2"),
    ("pre_norm_ffn.1", "mlp.c_fc"),
    ("pre_norm_ffn.4", "mlp.c_proj"),
    ("qkv_proj.", "in_proj_"),
    ("transformer.", "transformer.resblocks."),
)


def is_apples(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has Apple's names."""
    return any(name.startswith(IMAGE) for name in weights)


def renamed(
    weights: Mapping[str, Tensor], trunk: nn.Module, first_block: int = 0
) -> dict[str, Tensor]:
    """Apple's state dict under open_clip's names, without convolutional text blocks.

    trunk: timm's network, without weights; first_block: index of the first transformer block.
    """
    ours = {f"visual.trunk.{name}": tensor for name, tensor in _image(weights, trunk).items()}
    for name, tensor in weights.items():
        if name.startswith(TEXT) and not MIXER.fullmatch(name.removeprefix(TEXT)):
            ours[f"text.{text_name(name.removeprefix(TEXT), first_block)}"] = _table(name, tensor)
        elif name.startswith("logit_"):
            ours[name] = tensor
    return ours


def text_name(name: str, first_block: int) -> str:
    """open_clip's name of a weight of Apple's text tower."""
    for theirs, ours in TEXT_PARTS:
        name = name.replace(theirs, ours)
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)(\..+)", name)
    return f"transformer.resblocks.{int(block[1]) - first_block}{block[2]}" if block else name


def _table(name: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(0).squeeze(0) if "pos_embed" in name else tensor


def _image(weights: Mapping[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Weights of Apple's image tower under timm's names."""
    from timm.models import fastvit, vision_transformer_hybrid

    hybrid = f"{IMAGE}patch_emb.0.block.conv.weight" in weights
    theirs = vision_transformer_hybrid if hybrid else fastvit
    image = {name: tensor for name, tensor in weights.items() if name.startswith(IMAGE)}
    found: dict[str, Tensor] = theirs.checkpoint_filter_fn(image, trunk)
    return found


def mixers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both convolutional blocks of S0's text tower, folded, under our names.

    Convolution, batch norm, residual and layer scale are linear, so one convolution replaces them
    (MobileCLIP, section 3.2; FastViT, section 3.1).
    """
    text = {k.removeprefix(TEXT): v.float() for k, v in weights.items() if k.startswith(TEXT)}
    layers = sorted({int(found[1]) for name in text if (found := MIXER.fullmatch(name))})
    ours: dict[str, Tensor] = {}
    for name, layer in zip(("mixer_first", "mixer_last"), layers):
        prefix = f"transformer.{layer}."
        block = {k.removeprefix(prefix): v for k, v in text.items() if k.startswith(prefix)}
        ours |= {f"text.{name}.{part}": value for part, value in _mixer(block).items()}
    return ours


def _mixer(block: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight, bias = _conv_bn(block, "convffn.conv.")
    scale = block["layer_scale"].flatten()
    mix_weight, mix_bias = _token_mixer(block)
    return {
        "mix.weight": mix_weight.squeeze(2),
        "mix.bias": mix_bias,
        "conv.weight": weight.squeeze(2),
        "conv.bias": bias,
        "mlp.up.weight": block["convffn.fc1.weight"].flatten(1),
        "mlp.up.bias": block["convffn.fc1.bias"],
        "mlp.down.weight": block["convffn.fc2.weight"].flatten(1) * scale.unsqueeze(1),
        "mlp.down.bias": block["convffn.fc2.bias"] * scale,
    }


def _token_mixer(block: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """x + scale * (mixer(x) - norm(x)) as one convolution: kernel [D, 1, 1, K] and bias [D]."""
    if "token_mixer.reparam_conv.weight" in block:
        return block["token_mixer.reparam_conv.weight"], block["token_mixer.reparam_conv.bias"]
    weight, bias = _conv_bn(block, "token_mixer.mixer.rbr_conv.0.")
    same = torch.zeros_like(weight)
    same[..., weight.shape[-1] // 2] = 1
    for branch, sign in (("mixer", 1), ("norm", -1)):
        gain, shift = _batch_norm(block, f"token_mixer.{branch}.rbr_skip.")
        weight, bias = weight + sign * gain.view(-1, 1, 1, 1) * same, bias + sign * shift
    scale = block["token_mixer.layer_scale"].flatten()
    return same + scale.view(-1, 1, 1, 1) * weight, scale * bias


def _conv_bn(block: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    gain, shift = _batch_norm(block, f"{prefix}bn.")
    return block[f"{prefix}conv.weight"] * gain.view(-1, 1, 1, 1), shift


def _batch_norm(block: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation mode as gain and shift, each [D]."""
    deviation = (block[f"{prefix}running_var"] + BATCH_NORM_EPS).sqrt()
    gain = block[f"{prefix}weight"] / deviation
    return gain, block[f"{prefix}bias"] - block[f"{prefix}running_mean"] * gain
