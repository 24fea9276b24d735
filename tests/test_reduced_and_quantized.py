"""Fewer tokens and exact passes first, then integers: every order of magnitude must still agree."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny import EXACT_BITS, tiny_clip

from compress import plugin
from compress.clip import TorchEncoder, load, save
from compress.stages import exact, prune_tokens, quantize
from compress.work import Work
from export import Unavailable, onnxruntime, openvino

PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def smaller(work: Work, tmp_path: Path) -> Work:
    """A tower with fewer tokens and both last blocks for one token alone."""
    deep = replace(work, clip=tiny_clip(layers=3))
    pruned = prune_tokens.run(deep, prune_tokens.Config(keep=0.6, at=(0,)), tmp_path / "tokens")
    return exact.run(pruned, exact.Config(classes=False), tmp_path / "exact")


def test_a_reduced_tower_is_quantized_and_says_nearly_the_same(
    smaller: Work, tmp_path: Path
) -> None:
    made = quantize.run(smaller, quantize.Config(), tmp_path / "quantize").clip
    wanted = TorchEncoder(smaller.clip).encode_image(PIXELS)
    found = TorchEncoder(made).encode_image(PIXELS)
    assert float(F.cosine_similarity(found, wanted).min()) > 0.99
    save(made, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(TorchEncoder(again).encode_image(PIXELS), found)


@pytest.mark.parametrize("exporter", [onnxruntime, openvino])
@pytest.mark.parametrize("scheme", [False, True])
def test_its_int8_files_pass_parity(
    smaller: Work, tmp_path: Path, scheme: bool, exporter: ModuleType
) -> None:
    clip = replace(smaller.clip, data=smaller.data)
    if scheme:
        cfg = quantize.Config(weight_bits=EXACT_BITS)
        clip = quantize.run(smaller, cfg, tmp_path / "quantize").clip
    folder = tmp_path / "bundle"
    exporter.write(clip, exporter.Config(precision="int8", min_cosine=0.97), folder)
    found = exporter.load(folder).encode_image(PIXELS)
    wanted = TorchEncoder(clip).encode_image(PIXELS)
    assert float(F.cosine_similarity(found, wanted).min()) > 0.97


@pytest.mark.parametrize(
    "target, precision, least",
    [
        ("openvino", "fp32", 0.9999),
        ("onnxruntime", "int8-static", 0.95),
        ("openvino", "int8", 0.95),
        ("mnn", "w8", 0.98),
    ],
)
def test_other_runtimes_run_the_reduced_graph_in_floats_and_integers(
    smaller: Work, tmp_path: Path, target: str, precision: str, least: float
) -> None:
    exporter = plugin.find(plugin.EXPORTERS, target)
    clip = replace(smaller.clip, data=smaller.data)
    # Of a narrow random tower with 16 patches, where a near tie may fall to the other token.
    cfg = exporter.Config(precision=precision, min_cosine=least)
    try:
        exporter.write(clip, cfg, tmp_path / target)
    except Unavailable as reason:
        pytest.skip(str(reason))
    found = exporter.load(tmp_path / target).encode_image(PIXELS)
    wanted = TorchEncoder(clip).encode_image(PIXELS)
    assert float(F.cosine_similarity(found, wanted).min()) > least
