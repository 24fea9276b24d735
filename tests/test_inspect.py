"""The facts of a model against torch's own counters."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import tiny_clip
from torch.utils.flop_counter import FlopCounterMode

from compress import clip as clips
from compress.inspect import describe, num_macs, render
from compress.stages import quantize
from compress.work import Work


def test_multiply_adds_are_what_torch_counts() -> None:
    clip = tiny_clip()
    facts = describe(clip)
    for tower, inputs in (("image", torch.zeros(1, 3, 32, 32)), ("text", torch.zeros(1, 16))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            getattr(clip.model, tower)(inputs if tower == "image" else inputs.long())
        assert facts[tower]["num_macs"] * 2 == counter.get_total_flops()


def test_a_quantized_model_multiplies_as_often_as_its_float_one(work: Work, tmp_path: Path) -> None:
    """And can be described: rounding has no meta kernel."""
    cfg = quantize.Config(num_images=4, equalize="none")
    made = quantize.run(work, cfg, tmp_path).clip
    assert made.model.config.scheme is not None
    assert num_macs(made.model.config) == num_macs(work.clip.model.config)
    assert describe(made)["image"]["num_macs"] > 0


def test_parameters_and_size_are_those_of_the_saved_file(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    clip = tiny_clip()
    clips.save(clip, folder)
    facts = describe(clip)
    weights = clips.read_weights(folder / "model.safetensors")
    for tower in ("image", "text"):
        stored = [t.numel() for name, t in weights.items() if name.startswith(f"{tower}.")]
        assert facts[tower]["num_params"] == sum(stored)
        assert facts[tower]["size_bytes"] == 4 * sum(stored)
    assert facts["text"]["num_embedding_params"] == weights["text.token.weight"].numel()
    assert facts["num_params"] == sum(t.numel() for t in weights.values())


def test_facts_are_json_and_print() -> None:
    facts = describe(tiny_clip())
    assert json.loads(json.dumps(facts)) == facts
    console = Console(width=160, record=True, file=None)
    with console.capture() as captured:
        console.print(render(facts))
    shown = captured.get()
    for words in ("tiny", "Apache-2.0", "32 px, patch 8, 17 tokens", "16 tokens of 300", "gelu"):
        assert words in shown
