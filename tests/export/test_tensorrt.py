"""TensorRT bundles: types of the graph, parity as ONNX Runtime computes it, engines built ahead."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny import tiny_clip

from compress.clip import Clip, TorchEncoder
from compress.errors import GateFailed
from export import Unavailable, _engines, _parity, _qdq
from export import tensorrt as exporter
from export._verify import check_files, read

if not any(map(find_spec, _engines.PACKAGES)):
    pytest.skip("no TensorRT is installed", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("trace_once")

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="TensorRT runs on NVIDIA GPUs only")


@pytest.fixture(scope="module", params=["fp16", "int8", "fp8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / request.param
    exporter.write(tiny_clip(), exporter.Config(precision=request.param, calibration=8), folder)
    return folder


def graphs(folder: Path) -> list[onnx.ModelProto]:
    return [onnx.load(folder / f"{tower}.onnx") for tower in ("image", "text")]


def weights(model: onnx.ModelProto, node: onnx.NodeProto, index: int) -> np.ndarray:
    [tensor] = [t for t in model.graph.initializer if t.name == node.input[index]]
    return numpy_helper.to_array(tensor)


def test_bundle_says_what_was_built_and_what_was_not_run(bundle: Path) -> None:
    described = read(bundle)
    check_files(bundle, described["files"])
    assert described["executed"] is GPU
    assert GPU or "NVIDIA GPUs only" in described["unavailable"]
    for tower in ("image", "text"):
        assert described["parity"][tower]["worst_cosine"] > exporter.MIN_COSINE[bundle.name]
        built = described["runtime"][tower]
        assert built["built_for"] == "SM89" and built["engine_bytes"] > 1000
    assert not [name for name in described["files"] if name.endswith((".engine", ".plan"))]


def test_matrix_products_are_half_precision_and_layer_norms_are_not(bundle: Path) -> None:
    for model in graphs(bundle):
        typed = onnx.shape_inference.infer_shapes(model, data_prop=True)
        types = {v.name: v.type.tensor_type.elem_type for v in typed.graph.value_info}
        for node in typed.graph.node:
            if node.op_type in ("MatMul", "Gemm", "Softmax", "Gelu"):
                assert types[node.output[0]] == TensorProto.FLOAT16, node.name
            if node.op_type == "LayerNormalization":
                assert types[node.output[0]] == TensorProto.FLOAT, node.name


def test_inputs_and_outputs_are_those_of_every_bundle(bundle: Path) -> None:
    for model in graphs(bundle):
        [source], [target] = model.graph.input, model.graph.output
        kinds = source.type.tensor_type.elem_type, target.type.tensor_type.elem_type
        assert kinds[0] == (TensorProto.INT32 if source.name == "tokens" else TensorProto.FLOAT)
        assert kinds[1] == TensorProto.FLOAT


def test_eight_bits_have_no_zero_point(bundle: Path) -> None:
    pairs = 0
    for model in graphs(bundle):
        for node in model.graph.node:
            if node.op_type.endswith("quantizeLinear") or node.op_type == "QuantizeLinear":
                pairs += 1
            if node.op_type == "QuantizeLinear":
                assert not weights(model, node, 2).astype(np.float32).any()
    assert bool(pairs) == (bundle.name != "fp16")


def test_readme_code_is_python(bundle: Path) -> None:
    """It needs a GPU to run."""
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "example.py", "exec")
    assert "tensorrt" in code


def test_only_this_users_folder_may_hold_engines(tmp_path: Path) -> None:
    assert _engines.private(tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("open", "link"):
        with pytest.raises(Unavailable, match="others can write engines"):
            _engines.private(tmp_path / name)


def test_a_zero_point_is_refused_in_tensorrt_s_words(tmp_path: Path) -> None:
    """The reason why ranges are symmetric."""
    parts: list[Any] = [np.array(0.1, np.float32), np.array(3, np.int8), np.eye(4, dtype=np.int8)]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["bits"]),
        helper.make_node("DequantizeLinear", ["bits", "scale", "zero"], ["y"]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4])  # noqa: E731
    constants = [numpy_helper.from_array(p, n) for p, n in zip(parts, ("scale", "zero"))]
    graph = helper.make_graph(nodes, "pair", [value("x")], [value("y")], constants)
    path = tmp_path / "asymmetric.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    with pytest.raises(GateFailed, match=r"TensorRT cannot (parse|build) asymmetric\.onnx"):
        _engines.build(path, "SM89")


@pytest.mark.parametrize("kind", [_qdq.INT8, _qdq.FP8])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_come_back_to_half_a_step(kind: _qdq.Kind, axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    weight[:, 3] = 0
    bits, scale = _qdq.quantize_weight(weight, axis, kind)
    shape = (-1, 1) if axis == 0 else (1, -1)
    back = bits.astype(np.float32) * (scale.reshape(shape) if kind.per_column else scale)
    step = scale.max() if kind is _qdq.INT8 else np.abs(weight).max() / 8
    assert np.abs(back - weight).max() <= 0.5 * step + 1e-6
    assert bits.dtype == (np.int8 if kind is _qdq.INT8 else ml_dtypes.float8_e4m3fn)


def test_an_engine_is_built_for_the_gpu_that_is_here_unless_another_is_named() -> None:
    """tensorrt-rtx leaves Turing out of what it builds by default."""
    asked: list[tuple[Any, int]] = []
    config = SimpleNamespace(set_compute_capability=lambda kind, place: asked.append((kind, place)))
    kinds = SimpleNamespace(CURRENT="here", SM89="Ada")
    rtx = SimpleNamespace(__name__="tensorrt_rtx", __version__="1", ComputeCapability=kinds)
    _engines.aim(rtx, config, None)
    _engines.aim(rtx, config, "SM89")
    assert asked == [("here", 0), ("Ada", 0)] and config.num_compute_capabilities == 1
    with pytest.raises(Unavailable, match="tensorrt_rtx 1 doesn't build for SM90"):
        _engines.aim(rtx, config, "SM90")
    _engines.aim(SimpleNamespace(__name__="tensorrt"), None, None)


def test_an_engine_that_is_refused_says_by_whom_on_what_and_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Refusing:
        def __init__(self, logger: Any) -> None:
            logger.log(_engines.module().ILogger.ERROR, "built for another kind of GPU")

        def deserialize_cuda_engine(self, plan: bytes) -> None:
            return None

    monkeypatch.setattr(_engines, "engine", lambda path: b"plan")
    monkeypatch.setattr(_engines.module(), "Runtime", Refusing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    wanted = r"image\.onnx: .* refuses its own engine on NVIDIA H100: built for another kind of GPU"
    with pytest.raises(Unavailable, match=wanted + ".*need tensorrt"):
        _engines.Engine(tmp_path / "image.onnx")


def test_without_a_gpu_loading_says_why(bundle: Path) -> None:
    if not GPU:
        with pytest.raises(Unavailable, match="NVIDIA GPUs only"):
            exporter.load(bundle)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_engines_equal_torch_for_each_batch(
    clip: Clip, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    exporter.write(clip, exporter.Config(batch=batch), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "bundle.json").read_text())["executed"] is True
    pixels, tokens = (rows[:10] for rows in _parity.probes(clip))
    wanted, found = TorchEncoder(clip), exporter.load(tmp_path / "out")
    image = _parity.agreement(wanted.encode_image(pixels), found.encode_image(pixels), 1.0)
    text = _parity.agreement(wanted.encode_text(tokens), found.encode_text(tokens), 1.0)
    assert min(image["worst_cosine"], text["worst_cosine"]) > 0.999
    assert torch.allclose(found.encode_image(pixels.flip(0)).flip(0), found.encode_image(pixels))


@needs_gpu
def test_an_engine_is_built_once_and_kept_for_this_user(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    exporter.write(clip, exporter.Config(), tmp_path / "out")
    engines = {p: p.stat().st_mtime_ns for p in (tmp_path / _engines.CACHE).iterdir()}
    assert len(engines) == 2
    exporter.load(tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / _engines.CACHE).iterdir()} == engines
