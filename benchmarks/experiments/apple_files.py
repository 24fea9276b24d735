"""Checkpoints of MobileCLIP under Apple's names, random, and what they compute, for `models.py`.

Apple's own library is not needed: open_clip has the image tower and the plain text tower, and the
convolutional text block stands here in its training form, branch by branch.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments.small_networks import random_
from compress import plugin
from compress.clip import Clip

# open_clip's name of a part of the text tower -> Apple's.
TEXT_PARTS = (
    ("positional_embedding", "positional_embedding.pos_embed.pos_embed"),
    ("token_embedding", "embedding_layer"),
    ("ln_final", "final_layer_norm"),
    ("text_projection", "projection_layer"),
    ("ln_1", "pre_norm_mha.0"),
    ("attn.in_proj_", "pre_norm_mha.1.qkv_proj."),
    ("attn.out_proj", "pre_norm_mha.1.out_proj"),
    ("ln_2", "pre_norm_ffn.0"),
    ("mlp.c_fc", "pre_norm_ffn.1"),
    ("mlp.c_proj", "pre_norm_ffn.4"),
)
# timm's name of a part of fastvit -> Apple's, the way back of timm's own filter.
IMAGE_PARTS = (
    ("conv_kxk", "rbr_conv"),
    ("conv_scale", "rbr_scale"),
    ("identity", "rbr_skip"),
    ("final_conv", "conv_exp"),
    ("large_conv", "lkb_origin"),
    (".mlp.", ".convffn."),
    ("se.fc1", "se.reduce"),
    ("se.fc2", "se.expand"),
    (".gamma", ""),
)
BATCH_NORM = ("running_mean", "running_var", "weight", "bias")
S0_BLOCKS = (0, 5)
"""Places of the convolutional blocks in S0's text tower, before and after four others."""


class S0Text(nn.Module):
    """S0's text tower in its training form."""

    def __init__(self) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.plain = TextTransformer(width=512, heads=8, layers=4, no_causal_mask=True)
        self.mixers = [block(512, 11) for _ in S0_BLOCKS]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E]."""
        plain = self.plain
        x = plain.token_embedding(tokens) + plain.positional_embedding
        x = plain.transformer(in_training_form(x, self.mixers[0]))
        x = plain.ln_final(in_training_form(x, self.mixers[1]))
        projected: Tensor = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ plain.text_projection
        return projected

    def under_apples_names(self) -> dict[str, Tensor]:
        """Its state dict as in mobileclip_s0.pt."""
        theirs = apples_text(self.plain.state_dict(), first_block=1)
        for layer, mixer in zip(S0_BLOCKS, self.mixers):
            theirs |= {f"text_encoder.transformer.{layer}.{k}": v for k, v in mixer.items()}
        return theirs


def s0(folder: Path) -> tuple[Clip, nn.Module, nn.Module]:
    """mobileclip_s0.pt of random weights, opened -> ours, and the upstream image and text tower."""
    image, text = _model().visual, S0Text().eval()
    theirs = apples_image(image.trunk) | text.under_apples_names()
    return _opened(theirs, folder / "mobileclip_s0.pt", "mobileclip:S0"), image, text


def second_s0(folder: Path) -> tuple[Clip, nn.Module, nn.Module]:
    """mobileclip2_s0.pt of random weights, opened -> ours, and open_clip's two towers."""
    model = _model()
    theirs = apples_image(model.visual.trunk) | apples_text(model.text.state_dict())
    place = folder / "mobileclip2_s0.pt"
    return _opened(theirs, place, "open_clip:MobileCLIP2-S0"), model.visual, model.text


def apples_text(state: dict[str, Tensor], first_block: int = 0) -> dict[str, Tensor]:
    """open_clip's text tower under Apple's names; its blocks count from `first_block`."""
    theirs = {}
    for name, tensor in state.items():
        for ours, apples in TEXT_PARTS:
            name = name.replace(ours, apples)
        if found := re.fullmatch(r"transformer\.resblocks\.(\d+)(\..+)", name):
            name = f"transformer.{int(found[1]) + first_block}{found[2]}"
        theirs[f"text_encoder.{name}"] = tensor[None, None] if "pos_embed" in name else tensor
    return theirs


def apples_image(trunk: nn.Module) -> dict[str, Tensor]:
    """timm's fastvit_mci0 under Apple's names: its stages in one flat list."""
    # blocks of stage 0, downsampling, blocks of stage 1, ...; stage 3 begins with a position conv
    flat: dict[str, int | str] = {"0.blocks": 0, "1.blocks": 2, "2.blocks": 4, "3.blocks": 7}
    flat |= {f"{stage}.downsample.proj": f"{2 * stage - 1}.proj" for stage in (1, 2, 3)}
    flat["3.pos_emb.pos_enc"] = "6.pe"
    theirs = {}
    for name, tensor in trunk.state_dict().items():
        for place, number in flat.items():
            name = name.replace(f"stages.{place}.", f"network.{number}.")
        for timm_part, apples in IMAGE_PARTS:
            name = name.replace(timm_part, apples)
        name = name.replace("stem.", "patch_embed.", 1) if name.startswith("stem.") else name
        if name == "head.fc.weight":
            name, tensor = "head.proj", tensor.T
        if name != "head.fc.bias":
            theirs[f"image_encoder.model.{name}"] = tensor
    return theirs


def block(width: int, kernel: int) -> dict[str, Tensor]:
    """A convolutional text block in its training form, under Apple's names."""
    parts = {
        "token_mixer.mixer.rbr_conv.0.bn": batch_norm(width),
        "token_mixer.mixer.rbr_skip": batch_norm(width),
        "token_mixer.norm.rbr_skip": batch_norm(width),
        "convffn.conv.bn": batch_norm(width),
    }
    state = {f"{place}.{name}": t for place, norm in parts.items() for name, t in norm.items()}
    state["token_mixer.mixer.rbr_conv.0.conv.weight"] = torch.randn(width, 1, 1, kernel)
    state["token_mixer.layer_scale"] = torch.randn(width, 1, 1)
    state["convffn.conv.conv.weight"] = torch.randn(width, 1, 1, kernel)
    state["convffn.fc1.weight"] = torch.randn(4 * width, width, 1, 1)
    state["convffn.fc1.bias"] = torch.randn(4 * width)
    state["convffn.fc2.weight"] = torch.randn(width, 4 * width, 1, 1)
    state["convffn.fc2.bias"] = torch.randn(width)
    state["layer_scale"] = torch.randn(width, 1, 1)
    return state


def batch_norm(width: int) -> dict[str, Tensor]:
    """A batch norm [D] with random statistics."""
    return {
        "weight": torch.rand(width) + 0.5,
        "bias": torch.randn(width),
        "running_mean": torch.randn(width),
        "running_var": torch.rand(width) + 0.5,
    }


def in_training_form(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What the block computes branch by branch (FastViT, section 3.1). x [B, L, D] -> the same."""

    def norm(y: Tensor, place: str) -> Tensor:
        mean, var, weight, bias = (state[f"{place}.{name}"] for name in BATCH_NORM)
        return F.batch_norm(y, mean, var, weight, bias, eps=1e-5)

    def conv(y: Tensor, name: str) -> Tensor:
        weight = state[name]
        return F.conv2d(y, weight, padding=(0, weight.shape[-1] // 2), groups=len(weight))

    y = x.transpose(1, 2).unsqueeze(2)  # [B, D, 1, L]
    mixed = conv(y, "token_mixer.mixer.rbr_conv.0.conv.weight")
    mixed = norm(mixed, "token_mixer.mixer.rbr_conv.0.bn")
    mixed = mixed + norm(y, "token_mixer.mixer.rbr_skip")
    y = y + state["token_mixer.layer_scale"] * (mixed - norm(y, "token_mixer.norm.rbr_skip"))
    branch = norm(conv(y, "convffn.conv.conv.weight"), "convffn.conv.bn")
    branch = F.gelu(F.conv2d(branch, state["convffn.fc1.weight"], state["convffn.fc1.bias"]))
    branch = F.conv2d(branch, state["convffn.fc2.weight"], state["convffn.fc2.bias"])
    return (y + state["layer_scale"] * branch).squeeze(2).transpose(1, 2)


def _model() -> Any:
    """open_clip's MobileCLIP2-S0; its head has no bias, as Apple's has none."""
    import open_clip

    model = random_(open_clip.create_model("MobileCLIP2-S0"))
    nn.init.zeros_(model.visual.trunk.head.fc.bias)
    return model


def _opened(theirs: dict[str, Tensor], path: Path, name: str) -> Clip:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**theirs, "logit_scale": torch.tensor(4.0)}, path)
    return plugin.source(f"{name}@{path}", Path.cwd())
