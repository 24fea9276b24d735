"""ONNX Runtime bundles: precisions, sizes, the warning for CPUs whose sums overflow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import tiny_clip

from compress.errors import GateFailed
from export import Unavailable, _narrow, _saturation
from export import onnxruntime as exporter
from export._verify import verify

CHECKER = Path(__file__).parents[2] / "../shared/tools/check_bundle.py"


pytestmark = pytest.mark.usefixtures("trace_once")


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / f"onnxruntime-{request.param}"
    exporter.write(tiny_clip(), exporter.Config(precision=request.param), folder)
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "bundle.json").read_text())


def test_bundle_meets_its_goldens_and_says_what_it_is(bundle: Path) -> None:
    assert min(verify(bundle).values()) > 0.99
    description = read(bundle)
    assert (description["target"], description["precision"]) == (
        "onnxruntime",
        bundle.name.split("-")[1],
    )
    for tower in ("image", "text"):
        figures = description["parity"][tower]
        assert exporter.MIN_COSINE[description["precision"]] <= figures["worst_cosine"]
        assert figures["worst_cosine"] <= figures["p1_cosine"] <= 1 + 1e-9


@pytest.mark.skipif(not CHECKER.exists(), reason="the independent reader is not in this checkout")
def test_an_independent_reader_accepts_the_bundle(bundle: Path) -> None:
    done = subprocess.run([sys.executable, CHECKER, bundle], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_code_runs(bundle: Path) -> None:
    code = (bundle / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("%") == 3


def test_half_precision_takes_equal_weights(tmp_path: Path) -> None:
    """An untrained model's norms are all alike, and become one constant of the graph."""
    clip = tiny_clip()
    norms = [clip.model.text.blocks[i].norm1 for i in range(2)]
    assert norms[0].weight.equal(norms[1].weight)
    exporter.write(clip, exporter.Config(precision="fp16"), tmp_path / "out")
    assert min(verify(tmp_path / "out").values()) > 0.999
    kinds = {t.data_type for t in onnx.load(tmp_path / "out" / "text.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds


def test_half_precision_opens_with_scaled_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime takes the attention of MobileCLIP's image towers for float32."""
    from timm.models.fastvit import Attention

    torch.manual_seed(0)
    attention = Attention(64).eval()
    attention.fused_attn = False
    rows = torch.randn(1, 64, 2, 2)
    exported = torch.onnx.export(attention, (rows,), dynamo=True, verbose=False)
    assert exported is not None

    def run(graph: onnx.ModelProto) -> np.ndarray:
        session = onnxruntime.InferenceSession(graph.SerializeToString())
        return np.asarray(session.run(None, {session.get_inputs()[0].name: rows.numpy()})[0])

    wanted = attention(rows).detach().numpy()
    np.testing.assert_allclose(run(_narrow.scale_keys(exported.model_proto)), wanted, atol=1e-5)
    np.testing.assert_allclose(run(_narrow.half(exported.model_proto)), wanted, atol=2e-3)
    monkeypatch.setattr(_narrow, "scale_keys", lambda model: model)
    with pytest.raises(Exception, match="MLFloat16"):  # if this opens, scale_keys can go
        run(_narrow.half(exported.model_proto))


def test_scaled_queries_that_two_products_read_stay() -> None:
    made = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 20]>
        g (float[2, 3] q, float[3, 2] k) => (float[2, 2] a, float[2, 2] b)
        <float s = {0.5}> { x = Mul(q, s) a = MatMul(x, k) b = MatMul(x, k) }""")
    assert _narrow.scale_keys(made) == made


def test_int8_files_are_a_fraction_of_fp32(tmp_path: Path) -> None:
    clip = tiny_clip(width=128, embed_dim=64)
    sizes = {}
    for precision in ("fp32", "int8"):
        exporter.write(clip, exporter.Config(precision=precision), tmp_path / precision)
        sizes[precision] = sum(p.stat().st_size for p in (tmp_path / precision).glob("*.onnx"))
    assert sizes["int8"] < 0.32 * sizes["fp32"]


def test_a_gate_above_what_int8_reaches_is_reported_with_figures(tmp_path: Path) -> None:
    strict = exporter.Config(precision="int8", min_cosine=0.999999)
    with pytest.raises(GateFailed, match=r"onnxruntime int8, image tower, .*: worst cosine"):
        exporter.write(tiny_clip(), strict, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_full_range_weights_warn_on_a_cpu_without_vnni(
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    # On any CPU, though one without VNNI would not let it pass.
    config = exporter.Config(precision=precision, reduce_range=False, min_cosine=-1)
    exporter.write(tiny_clip(), config, tmp_path / "out")
    monkeypatch.setattr(_saturation, "machine_flags", lambda: {"avx2", "avx512f"})
    exporter.load(tmp_path / "out", threads=1)
    assert any("reduce_range" in str(w.message) for w in recwarn) == (precision == "int8")


@pytest.mark.parametrize("precision", ["int8", "int8-static"])
def test_a_cpu_without_vnni_writes_the_reduced_range_unless_told(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags, told, bits in (({"avx2"}, None, 7), ({"avx_vnni"}, None, 8), ({"avx2"}, False, 8)):
        monkeypatch.setattr(_saturation, "machine_flags", lambda flags=flags: flags)
        config = exporter.Config(precision=precision, reduce_range=told, min_cosine=-1)
        exporter.write(tiny_clip(), config, tmp_path / f"{bits}-{told}")
        assert read(tmp_path / f"{bits}-{told}")["runtime"]["weight_bits"] == bits


def test_a_gate_that_fails_without_vnni_says_what_may_be_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = exporter.Config(precision="int8", reduce_range=False, min_cosine=1)
    for flags, hinted in (({"avx2"}, True), ({"avx_vnni"}, False)):
        monkeypatch.setattr(_saturation, "machine_flags", lambda flags=flags: flags)
        with pytest.raises(GateFailed) as failed:
            exporter.write(tiny_clip(), config, tmp_path / "out")
        assert ("has no VNNI and its 8-bit sums can overflow" in str(failed.value)) == hinted


def test_reduced_range_is_recorded_and_does_not_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    config = exporter.Config(precision="int8", reduce_range=True)
    exporter.write(tiny_clip(), config, tmp_path / "out")
    assert read(tmp_path / "out")["runtime"]["weight_bits"] == 7
    tensors = onnx.load(tmp_path / "out" / "image.onnx").graph.initializer
    codes = [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8]
    assert codes and max(int(abs(c.astype(int)).max()) for c in codes) <= 64
    monkeypatch.setattr(_saturation, "machine_flags", lambda: {"avx2"})
    exporter.load(tmp_path / "out", threads=1)
    assert not any("reduce_range" in str(w.message) for w in recwarn)


def test_a_device_this_runtime_lacks_is_unavailable(bundle: Path) -> None:
    with pytest.raises(Unavailable, match="tpu"):
        exporter.load(bundle, device="tpu")


def test_flat_format_replaces_the_graphs_and_meets_its_goldens(tmp_path: Path) -> None:
    exporter.write(tiny_clip(), exporter.Config(format="ort"), tmp_path / "out")
    assert not list(tmp_path.rglob("*.onnx"))
    assert read(tmp_path / "out")["image"]["file"] == "image.ort"
    assert (tmp_path / "out" / "text.ort").read_bytes()[4:8] == b"ORTM"
    assert min(verify(tmp_path / "out").values()) > 0.9999


def test_static_int8_is_symmetric_and_leaves_products_of_activations_alone(tmp_path: Path) -> None:
    exporter.write(tiny_clip(), exporter.Config(precision="int8-static"), tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "image.onnx").graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) >= 9
    for node in pairs:
        zero = constants[node.input[2]]
        assert zero.dtype == "int8" and not zero.any()
    made = {name: node for node in graph.node for name in node.output}
    scores = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] not in constants]
    floats = [
        n for n in scores if made[n.input[1]].op_type not in ("DequantizeLinear", "QuantizeLinear")
    ]
    assert len(floats) == 4  # two products in each of two attentions
    assert read(tmp_path / "out")["runtime"]["calibration"]["source"] == "drawings"


def test_four_bits_need_a_matrix_as_wide_as_a_block(tmp_path: Path) -> None:
    clip = tiny_clip(width=64, embed_dim=32)
    exporter.write(clip, exporter.Config(precision="int4"), tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "image.onnx").graph
    packed = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(packed) == 8  # four matrices in each of two blocks
    assert all(a.i == 4 for node in packed for a in node.attribute if a.name == "bits")
