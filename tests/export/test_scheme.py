"""What ONNX Runtime computes of a scheme is what the torch model simulates."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from tiny import EXACT_BITS, tiny_clip, tiny_data
from torch import Tensor

from compress.clip import Clip, TorchEncoder
from compress.scheme import LayerScheme, Scheme
from compress.stages import quantize
from compress.twin import with_scheme
from compress.work import Work
from export import _decomposed, _nbits, _parity, _scheme, _snap, onnxruntime
from export import onnx as portable

W4 = {"act_bits": None, "weight_bits": 4}


def quantized(folder: Path, **settings: object) -> Clip:
    clip = tiny_clip(layers=1)
    work = Work(clip, clip, tiny_data(folder))
    cfg = quantize.Config.model_validate({"weight_bits": EXACT_BITS, **settings})
    return quantize.run(work, cfg, folder).clip


def executed(clip: Clip, tower: str, rows: Tensor) -> tuple[Tensor, dict[str, str]]:
    graph, notes = _scheme.realise(portable.graph(clip, tower, 1, 20), clip, tower, "onnxruntime")
    session = ort.InferenceSession(graph.SerializeToString())
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: row[None].numpy()})[0] for row in rows]
    return torch.from_numpy(np.concatenate(found)), notes


@pytest.mark.parametrize(
    ("tower", "settings", "agreement"),
    [
        # a value between two codes may fall to the other, and narrow layers notice
        ("text", {"act_symmetric": True}, 0.999),
        ("image", {"weight_symmetric": False}, 0.999),
        ("image", {"act": "dynamic"}, 0.999),
        ("text", {**W4, "weight_bits": 8}, 0.99999),
        ("text", {**W4, "group": 16, "weight_symmetric": False}, 0.99999),
        ("image", {**W4, "rounding": "gptq"}, 0.99999),
        # the kernel rounds inputs per block, the simulation per call
        ("text", {"weight_bits": 4, "group": 16, "act": "dynamic"}, 0.998),
    ],
    ids=["symmetric", "u8 weights", "dynamic", "w8", "w4 group", "w4 gptq", "w4a8"],
)
def test_executed_equals_simulated(
    tower: str, settings: dict[str, object], agreement: float, tmp_path: Path
) -> None:
    clip = quantized(tmp_path, **settings)
    rows = _parity.probes(clip)[tower == "text"][:12]
    simulated = TorchEncoder(clip)
    wanted = (simulated.encode_image if tower == "image" else simulated.encode_text)(rows)
    found, notes = executed(clip, tower, rows)
    assert torch.cosine_similarity(wanted, found).min() > agreement
    assert notes == {}


def test_fixed_ranges_are_multiplied_as_integers_bias_and_all(tmp_path: Path) -> None:
    """Left to fuse them itself, ONNX Runtime computes layers with a bias in float."""
    clip = quantized(tmp_path)
    graph, _ = _scheme.realise(portable.graph(clip, "image", 1, 20), clip, "image", "onnxruntime")
    kinds = [node.op_type for node in graph.graph.node]
    integers = sum(kind in ("MatMulIntegerToFloat", "QAttention") for kind in kinds)
    layers = [name for name in clip.model.config.scheme.layers if name.startswith("image.")]
    assert integers == len(layers) and "DequantizeLinear" not in kinds
    biased = [
        n for n in graph.graph.node if n.op_type == "MatMulIntegerToFloat" and any(n.input[6:])
    ]
    assert len(biased) == 3  # attention's last matrix and both of the MLP


@pytest.mark.parametrize("act", ["static", "dynamic"])
def test_massive_neurons_run_in_float_beside_the_integers(act: str, tmp_path: Path) -> None:
    clip = tiny_clip(layers=1)
    with torch.no_grad():
        mlp = clip.model.image.blocks[0].mlp
        mlp.up.bias[5] = 300.0
        mlp.down.weight[:, 5] *= 1e-2
    work = Work(clip, clip, tiny_data(tmp_path))
    cfg = quantize.Config.model_validate({"act": act, "weight_bits": EXACT_BITS})
    made = quantize.run(work, cfg, tmp_path).clip
    rows = _parity.probes(made)[0][:8]
    wanted = TorchEncoder(made).encode_image(rows)
    assert torch.cosine_similarity(wanted, TorchEncoder(clip).encode_image(rows)).min() > 0.99
    found, notes = executed(made, "image", rows)
    assert torch.cosine_similarity(wanted, found).min() > 0.999
    assert notes == {}
    lowered, _ = _decomposed.realise(made, "image", dynamic=act == "dynamic")
    with torch.no_grad():
        assert torch.cosine_similarity(wanted, lowered(rows)).min() > 0.999


def test_a_static_bundle_agrees_and_holds_integers(tmp_path: Path) -> None:
    clip = quantized(tmp_path)
    out = tmp_path / "bundle"
    onnxruntime.write(clip, onnxruntime.Config(precision="int8", min_cosine=0.999), out)
    told = json.loads((out / "bundle.json").read_text())["runtime"]
    assert told["scheme"] == f"w{EXACT_BITS}a8" and told["not_as_the_scheme_says"] == {}
    for tower in ("image", "text"):
        model = onnx.load(out / f"{tower}.onnx")
        arrays = [numpy_helper.to_array(t) for t in model.graph.initializer]
        floats = [a.size for a in arrays if a.dtype == np.float32 and a.ndim > 1]
        assert max(floats) <= max(getattr(clip.model, tower).position.numel(), 300)


def test_what_a_runtime_lacks_is_snapped_and_named(tmp_path: Path) -> None:
    clip = quantized(tmp_path, weight_bits=3, act_bits=6, family="adalog", attention=True)
    rows = _parity.probes(clip)[0][:8]
    found, told = executed(clip, "image", rows)
    assert told["image.blocks.0.attention.qkv"] == "asked w3a6 static, runs w7a8 static"
    assert told["image.blocks.0.mlp.down"] == "asked w3a6 adalog, runs w4a16 static"
    assert told["image.blocks.0.attention.query"].endswith("runs float static")
    wanted = TorchEncoder(clip).encode_image(rows)
    assert torch.cosine_similarity(wanted, found).min() > 0.9


def test_snapping_keeps_what_kernels_compute() -> None:
    for entry in (
        LayerScheme(weight_bits=8, act_bits=8),
        LayerScheme(weight_bits=8, act_bits=8, act="dynamic"),
        LayerScheme(weight_bits=4, group=32),
    ):
        assert _snap.nearest(entry, "image.blocks.0.mlp.up", "onnxruntime") == entry


@pytest.mark.parametrize(("width", "group"), [(48, 48), (64, 16), (96, 32)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_packed_blocks_unpack_to_the_codes(width: int, group: int, bits: int, kind: type) -> None:
    random = np.random.default_rng(0)
    low = -(2 ** (bits - 1)) if kind is np.int8 else 0
    codes = random.integers(low, low + 2**bits, (width, 3)).astype(kind)
    zero = random.integers(low, low + 2**bits, (3, width // group)).astype(kind)
    scale = random.random((3, width // group), dtype=np.float32)
    size = _nbits.block_size(width, group)
    packed, scales, zeros = _nbits.pack(codes, scale, zero, bits, size)

    def unpack(array: np.ndarray) -> np.ndarray:
        if bits == 8:
            return array.astype(int)
        pairs = np.stack([array & 15, array >> 4], axis=-1)
        return pairs.reshape(*array.shape[:-1], -1).astype(int)

    for row in range(3):
        for column in range(width):
            block = column // size
            value = int(unpack(packed)[row, block, column % size]) - int(unpack(zeros)[row, block])
            wanted = int(codes[column, row]) - int(zero[row, column // group])
            assert value * scales[row, block] == pytest.approx(
                wanted * scale[row, column // group], rel=1e-6
            )


@pytest.mark.parametrize("rest", ["float16", "float32"])
def test_a_model_that_stays_unrounded_is_written_in_floats(rest: str, tmp_path: Path) -> None:
    clip = tiny_clip(layers=1)
    with torch.no_grad():
        for tensor in clip.model.parameters():  # of equal norms the exporter makes one
            tensor.add_(torch.randn_like(tensor) * 0.02)
    made = clip.with_model(with_scheme(clip.model, Scheme(layers={}, rest=rest)), {})
    out = tmp_path / "bundle"
    onnxruntime.write(made, onnxruntime.Config(precision="int8", min_cosine=0.999), out)
    about = json.loads((out / "bundle.json").read_text())["runtime"]
    assert about["scheme"] == rest
    kinds = {i.data_type for i in onnx.load(out / "image.onnx").graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in kinds) == (rest == "float16")
    assert onnx.TensorProto.INT8 not in kinds


def test_openvino_computes_the_same_scheme(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from export import openvino

    clip = quantized(tmp_path)
    out = tmp_path / "bundle"
    openvino.write(clip, openvino.Config(precision="int8", min_cosine=0.999), out)
    told = json.loads((out / "bundle.json").read_text())["runtime"]
    assert told["not_as_the_scheme_says"] == {}


def test_openvino_leaves_inputs_float_where_the_scheme_does(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from export import openvino

    clip = quantized(tmp_path, act_bits=None)
    out = tmp_path / "bundle"
    openvino.write(clip, openvino.Config(precision="int8", min_cosine=0.99999), out)
    told = json.loads((out / "bundle.json").read_text())["runtime"]
    assert told["plugin"] == openvino.FLOAT_INPUTS
    assert told["weight_bits"] == 0
    assert not openvino.inputs_stay(quantized(tmp_path, act="dynamic").model.config.scheme)


def test_executorch_computes_the_same_scheme(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from export import executorch

    clip = quantized(tmp_path, act="dynamic", weight_bits=8)  # XNNPACK's sums don't overflow
    out = tmp_path / "bundle"
    executorch.write(clip, executorch.Config(precision="int8", min_cosine=0.999), out)
    told = json.loads((out / "bundle.json").read_text())["runtime"]
    assert set(told["not_as_the_scheme_says"]) == {"image.patch"}
    assert told["image"]["delegated_share"] > 0.8
    fixed = quantized(tmp_path, weight_bits=8)
    _, notes = _decomposed.realise(fixed, "image", dynamic=True)
    assert notes["image.blocks.0.mlp.up"] == "asked w8a8 static, runs w8a8 dynamic"


def test_executorch_multiplies_four_bits_by_eight(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    from export import executorch

    clip = tiny_clip(width=64)
    work = Work(clip, clip, tiny_data(tmp_path))
    sizes = []
    for bits, group in ((8, 0), (4, 32)):
        cfg = quantize.Config(weight_bits=bits, group=group, act="dynamic")
        made = quantize.run(work, cfg, tmp_path).clip
        out = tmp_path / f"bundle-{bits}"
        # steps of groups are stored in bfloat16, and a row's range is found for each token
        executorch.write(made, executorch.Config(precision="int8", min_cosine=0.998), out)
        told = json.loads((out / "bundle.json").read_text())["runtime"]
        assert set(told["not_as_the_scheme_says"]) == {"image.patch"}
        assert told["image"]["delegated_share"] > 0.8
        sizes.append((out / "image.pte").stat().st_size)
    # qkv, out, up and down of two blocks have 8 * width^2 weights each
    assert sizes[0] - sizes[1] > 0.75 * 2 * 8 * 64**2 / 2


def test_litert_computes_the_same_scheme(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    from export import litert

    clip = quantized(tmp_path, weight_bits=8)
    out = tmp_path / "bundle"
    litert.write(clip, litert.Config(precision="int8-static", min_cosine=0.999), out)
    told = json.loads((out / "bundle.json").read_text())["runtime"]
    assert set(told["not_as_the_scheme_says"]) <= {"image.patch"}
