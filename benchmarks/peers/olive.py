"""Olive's workflow on each tower: its quantization pass for ONNX files, dynamic, as on CPUs."""

from pathlib import Path

REQUIRES = ("olive-ai==0.13.0",)
FORMAT, PRECISION = "onnx", "int8-olive"


def compress(task: Path, out: Path) -> None:
    """task/onnx/{image,text}.onnx -> out/{image,text}.onnx; below is all that a user writes."""
    import shutil

    import olive

    for tower in ("image", "text"):
        folder = out / f"olive-{tower}"
        config = {
            "input_model": {
                "type": "ONNXModel",
                "model_path": str(task / "onnx" / f"{tower}.onnx"),
            },
            "passes": {
                "quantize": {"type": "OnnxDynamicQuantization", "quant_preprocess": False},
            },
            "cache_dir": str(folder / "cache"),
            "output_dir": str(folder / "model"),
        }
        olive.run(config)
        found = sorted((folder / "model").rglob("*.onnx"))
        shutil.copy(found[0], out / f"{tower}.onnx")
        shutil.rmtree(folder)
