"""Towers of other families export with the parity gate, and their bundles are checked as any."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PAD, VOCABULARY, tiny_clip
from torch import nn

from compress.clip import Clip
from compress.model import ClipModel, initialise_
from compress.preprocess import Preprocess
from compress.structure import ClipConfig, TextConfig, UpstreamVision, VisionConfig
from export import _verify, onnx

SHARED: dict[str, Any] = {"width": 32, "head_width": 8, "heads": (4, 4), "mlp_width": (64, 64)}
TEXT = {"vocab_size": VOCABULARY, "context_length": 16}
SIGLIP_AND_BERT = ClipConfig(
    embed_dim=32,
    vision=VisionConfig(
        image_size=32,
        patch_size=8,
        pooling="attention",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        projection="none",
        pool_heads=4,
        pool_head_width=8,
        pool_mlp_width=64,
        **SHARED,
    ),
    text=TextConfig(
        post_norm=True,
        embedding_norm=True,
        final_norm=False,
        causal=False,
        pad_id=PAD,
        pooling="mean",
        projection="mlp",
        projection_width=40,
        **TEXT,
        **SHARED,
    ),
    logit_bias=True,
)
CONVOLUTIONS = ClipConfig(
    embed_dim=32,
    vision=UpstreamVision(
        name="test_convnext",
        builder="open_clip",
        arguments={
            "vision_cfg": {
                "timm_model_name": "test_convnext",
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 64,
            }
        },
        image_size=64,
    ),
    text=TextConfig(causal=False, mixer_kernel=5, **TEXT, **SHARED),
)


def clip_of(config: ClipConfig) -> Clip:
    torch.manual_seed(0)
    model = ClipModel(config)
    initialise_(model)
    # Zero biases would turn a flat picture into an embedding of length 0.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.2)
    side = config.vision.image_size
    return replace(
        tiny_clip(), model=model.eval(), preprocess=Preprocess(size=(side, side), std=(0.5,) * 3)
    )


@pytest.mark.parametrize("config", [SIGLIP_AND_BERT, CONVOLUTIONS], ids=["siglip-bert", "conv"])
def test_family_exports_and_verifies(config: ClipConfig, tmp_path: Path) -> None:
    clip = clip_of(config)
    onnx.write(clip, onnx.Config(), tmp_path / "bundle")
    assert min(_verify.verify(tmp_path / "bundle").values()) > 0.9999
