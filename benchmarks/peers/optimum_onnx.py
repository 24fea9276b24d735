"""Optimum's ONNX Runtime quantizer with its preset for processors with AVX512-VNNI."""

from pathlib import Path

REQUIRES = ("optimum-onnx[onnxruntime]==0.1.0",)
FORMAT, PRECISION = "onnx", "int8-optimum"


def compress(task: Path, out: Path) -> None:
    """task/onnx/{image,text}.onnx -> out/{image,text}.onnx; below is all that a user writes."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    preset = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    for tower in ("image", "text"):
        quantizer = ORTQuantizer(task / "onnx" / f"{tower}.onnx")
        quantizer.quantize(save_dir=out, quantization_config=preset)
        (out / f"{tower}_quantized.onnx").rename(out / f"{tower}.onnx")
