"""The parity gate on encoders that go wrong in known ways, and the layer that it blames."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from tiny import tiny_clip, tiny_data
from torch import Tensor

from compress.clip import Clip, TorchEncoder
from compress.errors import GateFailed
from export import _goldens, _layers, _parity
from export import onnx as exporter


def uneven_clip() -> Clip:
    """The tiny clip with biases that differ: equal ones would share one tensor in a graph."""
    clip = tiny_clip()
    with torch.no_grad():
        for name, parameter in clip.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return clip


class Wrong(TorchEncoder):
    """The torch model with its text embeddings changed."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(tiny_clip())
        self.change = change

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.change(super().encode_text(tokens), tokens), dim=-1)


def test_an_exact_encoder_has_perfect_figures() -> None:
    clip = tiny_clip()
    figures = _parity.check(clip, TorchEncoder(clip), 0.9999, "itself")
    for tower, rows in (("image", 58), ("text", 97)):
        assert figures[tower].pop("num_rows") == rows
        assert all(value == pytest.approx(1, abs=1e-6) for value in figures[tower].values())
    assert {"padded_cosine", "full_cosine"} <= set(figures["text"])
    assert "zero_shot" not in figures


def test_an_error_in_full_length_texts_alone_is_seen() -> None:
    def change(embeddings: Tensor, tokens: Tensor) -> Tensor:
        full = tokens[:, -2] != 0
        return torch.where(full[:, None], embeddings.flip(-1), embeddings)

    with pytest.raises(GateFailed, match="cut, text tower, text '") as error:
        _parity.check(tiny_clip(), Wrong(change), 0.9, "cut", lambda tower, row: f"; {tower}!")
    assert str(error.value).endswith("; text!")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda e, _: e + 0.7 * torch.linspace(0, 1, len(e))[:, None] * e.flip(-1), "reordered"),
        (lambda e, _: e if len(e) > 1 else e.flip(-1), "alone"),
    ],
    ids=["place in the batch", "size of the batch"],
)
def test_rows_that_depend_on_their_batch_are_refused(
    change: Callable[[Tensor, Tensor], Tensor], key: str
) -> None:
    with pytest.raises(GateFailed, match=rf"other rows of a call \({key}_cosine"):
        _parity.check(tiny_clip(), _OnlyRepeated(change), 0.95, "batch")


class _OnlyRepeated(Wrong):
    """Right on the whole set of probes, so that only the repeated rows can show the fault."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        whole = len(tokens) > _parity.NUM_REPEATED
        return TorchEncoder.encode_text(self, tokens) if whole else super().encode_text(tokens)


def test_a_slow_runtime_computes_few_rows(tmp_path: Path) -> None:
    """A third of them, hard ones among them: goldens, flat pictures, an order, a row alone."""
    clip = replace(tiny_clip(), data=tiny_data(tmp_path))
    counted = Counting(clip)
    figures = _parity.check(clip, counted, 0.9999, "slow", few=True)
    assert (figures["image"]["num_rows"], figures["text"]["num_rows"]) == (18, 23)
    assert counted.rows == 18 + 23 + 2 * (_parity.FEW_REPEATED + 1)
    assert "zero_shot" not in figures
    assert figures["text"]["full_cosine"] == pytest.approx(1, abs=1e-6)


class Counting(TorchEncoder):
    """The torch model, counting the rows that it is asked for."""

    rows = 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.rows += len(pixels)
        return super().encode_image(pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens)
        return super().encode_text(tokens)


def test_nan_is_counted() -> None:
    nan = Wrong(lambda e, t: torch.where((t[:, -2] != 0)[:, None], torch.nan, e))
    with pytest.raises(GateFailed, match=r"\d+ of 97 outputs hold NaN"):
        _parity.check(tiny_clip(), nan, 0.9, "nan")


def test_zero_shot_delta_counts_the_lost_answers(tmp_path: Path) -> None:
    clip = replace(tiny_clip(), data=tiny_data(tmp_path))
    same = _parity.check(clip, TorchEncoder(clip), 0.9, "same")["zero_shot"]
    assert (same["num_images"], same["num_classes"], same["delta"]) == (8, 8, 0)
    other = TorchEncoder(tiny_clip(seed=3))
    from export import _zero_shot

    found = _zero_shot.compare(clip, TorchEncoder(clip), other)["zero_shot"]
    assert found["delta"] == pytest.approx(found["top1"] - found["torch_top1"])
    assert found["torch_top1"] == same["torch_top1"]


@pytest.mark.parametrize("layer", ["tower.blocks.0.mlp.down", "tower.blocks.1.attention.out"])
def test_the_first_diverging_layer_is_named(layer: str, trace_once: None) -> None:
    """A layer's bias is ruined in the graph: that layer is blamed, not those after it."""
    clip = uneven_clip()
    plain = exporter.graph(clip, "image", 1, 20)
    changed = exporter.graph(clip, "image", 1, 20)
    module = exporter.unit(clip, "image")
    bias = module.get_parameter(f"{layer}.bias").detach()
    bias = bias + torch.linspace(-5, 5, len(bias))
    for tensor in changed.graph.initializer:
        if tensor.name == f"{layer}.bias":
            tensor.CopyFrom(numpy_helper.from_array(bias.numpy(), tensor.name))
    row = clip.preprocess(_goldens.drawing(0, (40, 40)))[None]
    said = _layers.first_diverging(module, row, plain, changed, 0.99)
    assert f"first layer below it is {layer} " in said


def test_a_failed_export_names_the_layer(
    trace_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = exporter.save

    def damaging(model: onnx.ModelProto, path: Path) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "tower.blocks.1.mlp.up.bias" and path.name == "text.onnx":
                values = numpy_helper.to_array(tensor) + 9
                tensor.CopyFrom(numpy_helper.from_array(values.astype("f"), tensor.name))
        save(model, path)

    monkeypatch.setattr(exporter, "save", damaging)
    with pytest.raises(GateFailed, match=r"first layer below it is tower\.blocks\.1\.mlp\.up"):
        exporter.write(uneven_clip(), exporter.Config(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_holds_the_new_figures(trace_once: None, tmp_path: Path) -> None:
    exporter.write(tiny_clip(), exporter.Config(), tmp_path / "out")
    parity = json.loads((tmp_path / "out" / "bundle.json").read_text())["parity"]
    assert parity["image"]["reordered_cosine"] == pytest.approx(1, abs=1e-6)
    assert parity["text"]["full_cosine"] == pytest.approx(1, abs=1e-6)


def test_every_probe_is_a_picture_of_8_bits(clip: Clip) -> None:
    """Core ML's image input takes nothing else: black and white were out of its reach before."""
    pixels, _ = _parity.probes(clip)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (clip.preprocess.mean, clip.preprocess.std)
    )
    levels = (pixels * std + mean) * 255
    assert (levels - levels.round()).abs().max() < 1e-2
    assert levels.min().round() == 0 and levels.max().round() == 255
    assert [len(row.unique()) for row in levels[-3:].round()] == [1, 1, 1]
