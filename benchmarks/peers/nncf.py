"""NNCF's post-training quantization with its defaults for transformers, run by OpenVINO."""

from pathlib import Path

REQUIRES = ("openvino>=2026.4", "nncf>=3.4")
FORMAT, PRECISION = "openvino", "int8-static"


def compress(task: Path, out: Path) -> None:
    """task/onnx and task/calibration -> out/{image,text}.xml; below is all that a user writes."""
    import nncf
    import numpy as np
    import openvino

    for tower in ("image", "text"):
        model = openvino.convert_model(task / "onnx" / f"{tower}.onnx")
        rows = np.load(task / "calibration" / f"{tower}.npy")
        dataset = nncf.Dataset([row[None] for row in rows])
        quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(quantized, out / f"{tower}.xml")
