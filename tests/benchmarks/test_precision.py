"""The precision map against models whose layers' precision we chose."""

import pytest
import torch
from tiny import tiny_clip

import export.onnxruntime
from benchmarks import precision

WIDTH = 64  # every matrix is large enough to count as one


@pytest.fixture(scope="module")
def clip():
    return tiny_clip(layers=1, width=WIDTH)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def made(request, clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision") / request.param
    cfg = export.onnxruntime.Config(precision=request.param, min_cosine=0.5)
    export.onnxruntime.write(clip, cfg, folder)
    return request.param, folder


def test_every_layer_of_the_image_tower_is_named_with_its_precision(made, clip):
    kind, folder = made
    found = precision.layers(folder, "image", clip)
    dtype = {"fp32": "float32", "int8": "int8"}[kind]
    names = [
        f"blocks.0.{part}" for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert [row["name"] for row in found] == ["patch", *names, "projection"]
    assert {row["dtype"] for row in found} == {dtype}
    weights = dict(clip.model.image.named_parameters())
    for row in found:
        assert row["num_weights"] == weights[f"{row['name']}.weight"].numel()


def test_token_table_is_a_layer_of_the_text_tower(made, clip):
    kind, folder = made
    found = precision.layers(folder, "text", clip)
    assert found[0]["name"] == "token" and found[0]["bits"] == {"fp32": 32, "int8": 8}[kind]
    assert found[0]["num_weights"] == clip.model.text.token.weight.numel()


def test_format_that_cannot_be_read_has_no_map(made, clip, monkeypatch):
    about = {"image": {"file": "image.tflite"}}
    monkeypatch.setattr(precision._verify, "read", lambda folder: about)
    assert precision.layers(made[1], "image", clip) is None


def test_names_are_those_of_the_modules():
    assert isinstance(tiny_clip().model.image.patch, torch.nn.Conv2d)
    assert precision.layer_names(tiny_clip(), "image")[0] == "patch"
