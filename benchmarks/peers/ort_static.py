"""ONNX Runtime's static quantization: prepared, calibrated, QDQ with int8 on both sides."""

from pathlib import Path

REQUIRES = ()
FORMAT, PRECISION = "onnx", "int8-static"


def compress(task: Path, out: Path) -> None:
    """task/onnx and task/calibration -> out/{image,text}.onnx; below is all that a user writes."""
    import numpy as np
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str, rows: np.ndarray) -> None:
            self.rows = iter([{name: row[None]} for row in rows])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    for tower, name in (("image", "pixels"), ("text", "tokens")):
        rows = np.load(task / "calibration" / f"{tower}.npy")
        prepared = out / f"{tower}.prepared.onnx"
        quant_pre_process(task / "onnx" / f"{tower}.onnx", prepared, skip_symbolic_shape=True)
        reader, target = Reader(name, rows), out / f"{tower}.onnx"
        quantize_static(prepared, target, reader, quant_format=QuantFormat.QDQ, per_channel=True)
        prepared.unlink()
