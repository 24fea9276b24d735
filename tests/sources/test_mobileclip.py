"""Apple's own checkpoints as ours: names, folded branches, the convolutional text tower."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import PocketclipError
from compress.layers import MixerBlock
from compress.sources import _mobileclip, mobileclip


def batch_norm(width: int) -> dict[str, Tensor]:
    return {
        "weight": torch.rand(width) + 0.5,
        "bias": torch.randn(width),
        "running_mean": torch.randn(width),
        "running_var": torch.rand(width) + 0.5,
    }


def block(width: int, kernel: int) -> dict[str, Tensor]:
    """A text block in its training form, under Apple's names."""
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


def in_training_form(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What the block computes branch by branch (FastViT, section 3.1). x [B, L, D] -> the same."""

    def norm(y: Tensor, place: str) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{place}.{name}"] for name in names), False, 0.0, 1e-5)

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


def test_text_block_is_its_training_form_folded() -> None:
    state = block(12, 5)
    ours = MixerBlock(12, 48, 5, "gelu")
    ours.load_state_dict(_mobileclip._mixer(state))
    x = torch.randn(2, 9, 12)
    expected = in_training_form(x, state)
    with torch.no_grad():
        found = ours(x)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-6)


def apples_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our S0 text tower under Apple's names, its convolutional blocks random."""
    names = {
        "norm1": "pre_norm_mha.0",
        "attention.qkv": "pre_norm_mha.1.qkv_proj",
        "attention.out": "pre_norm_mha.1.out_proj",
        "norm2": "pre_norm_ffn.0",
        "mlp.up": "pre_norm_ffn.1",
        "mlp.down": "pre_norm_ffn.4",
    }
    theirs = {
        "embedding_layer.weight": state["text.token.weight"],
        "positional_embedding.pos_embed.pos_embed": state["text.position"][None, None],
        "final_layer_norm.weight": state["text.norm_final.weight"],
        "final_layer_norm.bias": state["text.norm_final.bias"],
        "projection_layer": state["text.projection.weight"].T,
    }
    for layer in range(4):
        for ours, apples in names.items():
            for kind in ("weight", "bias"):
                name = f"transformer.{layer + 1}.{apples}.{kind}"
                theirs[name] = state[f"text.blocks.{layer}.{ours}.{kind}"]
    for layer in (0, 5):
        theirs |= {f"transformer.{layer}.{k}": v for k, v in block(512, 11).items()}
    return {f"text_encoder.{name}": tensor for name, tensor in theirs.items()}


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


def test_apples_file_of_s0_opens_and_carries_its_licence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random = mobileclip.load("S0/random")
    state = random.model.state_dict()
    tower = random.model.image.tower
    assert isinstance(tower, nn.Module) and isinstance(tower.trunk, nn.Module)
    nn.init.zeros_(tower.trunk.head.fc.bias)  # type: ignore[union-attr, arg-type]
    theirs = {**apples_text(state), **apples_image(tower.trunk), "logit_scale": torch.tensor(4.0)}
    torch.save(theirs, tmp_path / "mobileclip_s0.pt")
    clip = mobileclip.load(f"S0@{tmp_path / 'mobileclip_s0.pt'}")
    for name, tensor in clip.model.state_dict().items():
        if "mixer_" not in name and name != "logit_scale":
            assert torch.equal(tensor, state[name]), name
    mixer = "text.mixer_last.mix.weight"
    assert torch.equal(clip.model.state_dict()[mixer], _mobileclip.mixers(theirs)[mixer])
    assert "research purposes only" in clip.license and clip.provenance[0]["research_only"]
    assert (clip.preprocess.mean, clip.preprocess.interpolation) == ((0.0,) * 3, "bilinear")


@pytest.mark.parametrize("name", ["S7/random", "S0", "S1@missing.pt"])
def test_wrong_names_get_a_remedy(name: str) -> None:
    with pytest.raises(PocketclipError, match=r"mobileclip_s[01]\.pt"):
        mobileclip.load(name)
