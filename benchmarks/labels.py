"""Words and number formats of the report."""

from collections.abc import Callable
from typing import Any

TARGETS = {
    "torch": "PyTorch",
    "onnx": "ONNX",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "coreml": "Core ML",
    "executorch": "ExecuTorch",
    "litert": "LiteRT",
    "ncnn": "ncnn",
    "mnn": "MNN",
    "web": "Web",
}
METRICS = {
    "top1": "top-1 accuracy",
    "image_to_text_r1": "image-to-text recall@1",
}
NOTHING = "–"


def name_of(row: dict[str, Any]) -> str:
    """`Student · ONNX Runtime int8`."""
    target = TARGETS.get(row["target"], row["target"])
    precision = f" {row['precision']}" if row["precision"] else ""
    return f"{row['artifact'].capitalize()} · {target}{precision}"


def describe_metric(metric: str | None) -> str:
    return METRICS.get(metric or "", "accuracy")


def percent(fraction: float | None, digits: int = 1) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.{digits}f} %"


def interval(bounds: list[float] | None) -> str:
    """A 95 % interval of a fraction, in percent."""
    if bounds is None:
        return "interval not known"
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def megabytes(size: float | None) -> str:
    if size is None:
        return NOTHING
    return f"{size / 1e6:.2f} MB" if size < 10e6 else f"{size / 1e6:.1f} MB"


def millions(count: float | None) -> str:
    if count is None:
        return NOTHING
    return f"{count / 1e6:.2f} M" if count < 10e6 else f"{count / 1e6:.1f} M"


def milliseconds(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return NOTHING
    digits = 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{digits}f} ms"


def times(ratio: float | None) -> str:
    if ratio is None:
        return NOTHING
    return f"{ratio:.1f}×" if ratio < 99.95 else f"{ratio:.0f}×"


def times_interval(bounds: list[float] | None) -> str:
    return "interval not known" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}×"


def cosine(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def formats() -> dict[str, Callable[..., str]]:
    """The filters that the templates use."""
    functions = (percent, interval, megabytes, millions, milliseconds, times, times_interval)
    named: dict[str, Callable[..., str]] = {f.__name__: f for f in functions}
    return named | {"cosine": cosine, "duration": duration, "split_name": split_name}


def split_name(name: str) -> str:
    return name.replace("_", " ")
