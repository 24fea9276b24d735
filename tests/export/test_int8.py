"""The int8 graph: what is stored, what is fused, and what it computes, against slow arithmetic."""

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from tiny import tiny_clip, tiny_config
from torch import Tensor, nn

from compress.clip import Clip, TorchEncoder
from compress.model import ClipConfig, ClipModel, initialise_
from export import _int8, _parity, _saturation
from export import onnx as portable

LIMIT = _int8.REDUCED_RANGE if _saturation.here() else _int8.FULL_RANGE
"""What this CPU's kernels add without overflow."""


def varied(**changes: dict[str, object]) -> Clip:
    """The tiny clip with fields of its `vision` or `text` structure changed."""
    structure = tiny_config().model_dump()
    for tower, fields in changes.items():
        structure[tower].update(fields)
    model = ClipModel(ClipConfig.model_validate(structure))
    initialise_(model)
    return replace(tiny_clip(), model=model.eval())


@functools.cache
def plain(tower: str) -> onnx.ModelProto:
    """The tiny clip's tower in int8; tests only read it."""
    return _int8.rewrite(portable.graph(tiny_clip(), tower, 1, 20))


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def count(model: onnx.ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def run(model: onnx.ModelProto, rows: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    name = session.get_inputs()[0].name
    return torch.from_numpy(
        np.concatenate([session.run(None, {name: row[None].numpy()})[0] for row in rows])
    )


def test_weight_scales_equal_a_slow_loop() -> None:
    weight = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    weight[:, 2] = 0
    integers, scale = _int8.quantize_weight(weight)
    for column in range(4):
        largest = max(abs(float(value)) for value in weight[:, column])
        assert scale[column] == pytest.approx(largest / 127 if largest else 1)
        for row in range(5):
            assert integers[row, column] == round(float(weight[row, column]) / scale[column])
    assert np.abs(integers * scale - weight).max() <= scale.max() / 2 * 1.001


@pytest.mark.parametrize("patch_as", ["conv", "matmul"])
def test_sums_of_pixels_fit_16_bits_wherever_the_file_goes(patch_as: str) -> None:
    """Smooth bright pictures under smooth weights overflow, not the layers behind a norm."""
    made = _int8.rewrite(portable.graph(varied(vision={"patch_as": patch_as}), "image", 1, 20))
    largest = [int(np.abs(w).max()) for w in weights(made).values() if w.dtype == np.int8]
    assert largest.count(_int8.REDUCED_RANGE) == 1
    assert largest.count(_int8.FULL_RANGE) == len(largest) - 1 > 0


def test_reduced_range_leaves_room_for_two_products_in_16_bits() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    integers, _ = _int8.quantize_weight(weight, _int8.REDUCED_RANGE)
    assert np.abs(integers).max() == 64
    assert 2 * 255 * 64 <= np.iinfo(np.int16).max < 2 * 255 * _int8.FULL_RANGE


def test_token_table_is_stored_as_int8_rows() -> None:
    clip, model = tiny_clip(), plain("text")
    table = clip.model.text.token.weight.detach().numpy()
    stored = {name: array for name, array in weights(model).items() if array.shape == table.shape}
    assert [array.dtype for array in stored.values()] == [np.dtype("int8")]
    (name,) = stored
    scale = weights(model)[name.replace("int8", "scale")]
    assert scale.shape == (len(table), 1)
    for row in range(len(table)):
        largest = np.abs(table[row]).max()
        assert scale[row, 0] == pytest.approx(largest / 127)
        assert np.abs(stored[name][row] * scale[row] - table[row]).max() <= largest / 254 * 1.001


def test_no_large_float_weight_is_left() -> None:
    clip = tiny_clip()
    for tower in ("image", "text"):
        model = plain(tower)
        matrices = {n: a for n, a in weights(model).items() if a.dtype == np.float32 and a.ndim > 1}
        positions = getattr(clip.model, tower).position.numel()
        assert max(a.size for a in matrices.values()) <= max(positions, 300)
        assert count(model, "MatMul") == count(model, "Gemm") == count(model, "Conv") == 0


def test_every_attention_of_both_towers_is_fused() -> None:
    for tower, causal in (("image", 0), ("text", 1)):
        model = plain(tower)
        assert count(model, "QAttention") == 2
        assert count(model, "Softmax") == 0
        for node in model.graph.node:
            if node.op_type == "QAttention":
                found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert found["unidirectional"] == causal


@pytest.mark.parametrize(
    "changes",
    [
        {"vision": {"heads": (4, 1), "mlp_width": (64, 24)}, "text": {"heads": (2, 3)}},
        {
            "vision": {"pooling": "mean", "class_token": False, "patch_bias": True},
            "text": {"causal": False, "pooling": "last", "activation": "quick_gelu"},
        },
    ],
    ids=["pruned heads", "other structure"],
)
def test_int8_towers_stay_near_torch(changes: dict[str, dict[str, object]]) -> None:
    clip = varied(**changes)
    pixels, tokens = _parity.probes(clip)
    wanted = TorchEncoder(clip)
    for tower, rows, embeddings in (
        ("image", pixels, wanted.encode_image(pixels)),
        ("text", tokens, wanted.encode_text(tokens)),
    ):
        found = run(_int8.rewrite(portable.graph(clip, tower, 1, 20), LIMIT), rows)
        # 8-bit rounding noise of narrow random layers; a wrong head order or mask gives below 0.9.
        assert torch.cosine_similarity(found, embeddings).min() > 0.99


def test_a_mask_that_is_not_causal_keeps_its_attention() -> None:
    clip = varied()
    assert clip.model.text.mask is not None
    clip.model.text.mask[5, 2] = -1e4
    model = _int8.rewrite(portable.graph(clip, "text", 1, 20), LIMIT)
    assert (count(model, "QAttention"), count(model, "Softmax")) == (0, 2)
    _, tokens = _parity.probes(clip)
    wanted = TorchEncoder(clip).encode_text(tokens)
    assert torch.cosine_similarity(run(model, tokens), wanted).min() > 0.99


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (4, 2), stride=(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


def exported(module: nn.Module, x: Tensor) -> onnx.ModelProto:
    program = torch.onnx.export(module.eval(), (x,), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize("batch", [1, 2])
def test_patches_as_matmul_equal_the_convolution(batch: int) -> None:
    module, x = _Patches(), torch.randn(batch, 3, 8, 6)
    model = exported(module, x)
    made = _int8.rewrite(model, LIMIT)
    integers = {n: a for n, a in weights(made).items() if a.dtype == np.int8}
    assert [a.shape for a in integers.values()] == [(24, 5)]
    session = onnxruntime.InferenceSession(made.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    (low, high), reach = (x.min().item(), x.max().item()), module.conv.weight.abs().flatten(1)
    step, weight_step = (high - low) / 255, reach.amax(1).max().item() / LIMIT
    bound = 24 * (step * reach.max().item() + weight_step * max(-low, high)) / 2
    with torch.no_grad():
        assert np.abs(found - module(x).numpy()).max() < bound / 4  # errors don't all add up


def test_linear_equals_integer_arithmetic() -> None:
    """u8 codes from min and max including 0, int8 weights, an exact integer sum, one scale."""
    module, x = nn.Linear(6, 4), torch.randn(3, 6)
    model = _int8.rewrite(exported(module, x), LIMIT)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    low, high = min(0.0, x.min().item()), max(0.0, x.max().item())
    step = (high - low) / 255
    zero = round(-low / step)
    codes = np.clip(np.rint(x.numpy() / step) + zero, 0, 255) - zero
    integers, scale = _int8.quantize_weight(module.weight.detach().numpy().T, LIMIT)
    wanted = codes @ integers * (step * scale) + module.bias.detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_tokens_stay_int32() -> None:
    assert plain("text").graph.input[0].type.tensor_type.elem_type == TensorProto.INT32
