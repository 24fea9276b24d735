"""Placement against graphs whose operators we count ourselves."""

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import placement


def three_nodes(path):
    """A graph in which ONNX Runtime finds nothing to fuse or to drop."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "x"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "three", [x], [y])
    opset = [helper.make_opsetid("", 20)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_operators_of_an_onnx_file_are_counted_by_provider(tmp_path):
    found = placement.of_onnx(three_nodes(tmp_path / "image.onnx"))
    assert found["operators"] == {"CPUExecutionProvider": {"MatMul": 2, "Softmax": 1}}
    assert found["fallback"] == [] and placement.warning(found) is None


def test_fallback_is_warned_of_with_its_operators():
    ran = [("CoreML", "Conv")] * 3 + [("CPU", "Gather")] * 2 + [("CPU", "Softmax")]
    found = placement._placed("CoreML", ran)
    assert placement.warning(found) == (
        "CoreML was asked for, but 3 of 6 operators ran on CPU (2 Gather, 1 Softmax)"
    )


def test_operators_of_an_openvino_file_are_counted_by_precision(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(three_nodes(tmp_path / "image.onnx"))
    openvino.save_model(model, tmp_path / "image.xml", compress_to_fp16=False)
    found = placement.of_openvino(tmp_path / "image.xml", "f32")
    assert list(found["operators"]) == ["CPU f32"]
    counts = {kind: n for kind, n in found["operators"]["CPU f32"].items() if kind != "Reshape"}
    # Where one thread is all there is, OpenVINO fuses attention.
    assert counts in ({"MatMul": 2, "Softmax": 1}, {"Subgraph": 1})
