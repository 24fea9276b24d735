"""torch's quantize operators compute what the scheme simulates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip, tiny_data

from compress import calibrate
from compress.clip import Clip, TorchEncoder
from compress.nn.fake import RoundedEmbedding
from compress.stages import quantize
from compress.work import Work
from export import _decomposed, _parity


def quantized(folder: Path, **settings: object) -> Clip:
    clip = tiny_clip(layers=1)
    work = Work(clip, clip, tiny_data(folder))
    return quantize.run(work, quantize.Config(**settings), folder).clip


@pytest.mark.parametrize("settings", [{}, {"act_symmetric": True}], ids=["static", "symmetric"])
def test_integer_layers_equal_the_simulation(settings: dict[str, object], tmp_path: Path) -> None:
    clip = quantized(tmp_path, **settings)
    pixels, tokens = _parity.probes(clip)
    simulated = TorchEncoder(clip)
    for tower, rows, wanted in (
        ("image", pixels, simulated.encode_image(pixels)),
        ("text", tokens, simulated.encode_text(tokens)),
    ):
        module, notes = _decomposed.realise(clip, tower, folded=tower == "text")
        with torch.no_grad():
            found = module(rows)
        assert torch.cosine_similarity(found, wanted, dim=-1).min() > 0.999
        assert set(notes) <= {"image.patch"}
        kinds = [type(m) for m in module.modules()]
        assert kinds.count(_decomposed.IntegerLinear) == 5
        assert RoundedEmbedding not in kinds


def test_the_tower_can_be_exported_with_its_operators(tmp_path: Path) -> None:
    clip = quantized(tmp_path)
    module, _ = _decomposed.realise(clip, "text")
    tokens = calibrate.draw(replace(clip), tiny_data(tmp_path), 1, 0).tokens
    program = torch.export.export(module, (tokens,))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("quantize_per_tensor" in name for name in names) == 2 * 5
    assert sum("dequantize_per_channel" in name for name in names) == 5


def test_what_has_no_pattern_is_named(tmp_path: Path) -> None:
    _, notes = _decomposed.realise(quantized(tmp_path, act="dynamic"), "text")
    assert notes["text.blocks.0.mlp.up"].startswith("asked w8a8 dynamic, runs in float")
