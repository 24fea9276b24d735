"""ONNX Runtime's dynamic quantization as its documentation shows it: every operator it knows."""

from pathlib import Path

REQUIRES = ()
FORMAT, PRECISION = "onnx", "int8-dynamic"


def compress(task: Path, out: Path) -> None:
    """task/onnx/{image,text}.onnx -> out/{image,text}.onnx; below is all that a user writes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for tower in ("image", "text"):
        quantize_dynamic(
            task / "onnx" / f"{tower}.onnx", out / f"{tower}.onnx", weight_type=QuantType.QInt8
        )
