"""OpenVINO for Intel CPUs, GPUs and NPUs: float, int8 through NNCF, or integer weights only.

Left to itself OpenVINO computes in bfloat16 wherever the CPU can (cosine 0.998 and worse): the
precision is pinned by `inference_precision`, written into the bundle, and read back after loading.
"""

import json
import platform
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.clip import Clip
from compress.scheme import Scheme
from compress.twin import float_twin
from export import Unavailable, _batches, _bundle, _calibration, _integers, _saturation, _scheme
from export import onnx as portable

VERSION = 2
REQUIRES = "openvino"
HONOURS_SCHEME = True

Precision = Literal["fp32", "fp16", "int8", "int8-weights", "int4"]
Inference = Literal["f32", "bf16", "f16"]
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.9, "int8-weights": 0.98, "int4": 0.9}
# Left to itself the CPU rounds the inputs of matrices with integer weights to 8 bits in groups of
# 32, whatever the file says (cosine 0.9998 on the embedded teacher).
FLOAT_INPUTS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
REMEDY = "quantize with weight_bits: 7"


class Config(BaseModel):
    """Settings of the OpenVINO files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Precision = "fp32"
    """fp32, fp16: type of the stored weights. int8: weights and activations, fixed ranges; of a
    model with a scheme what the scheme says, as near as this runtime has it.
    int8-weights, int4: weights only, computed in `inference_precision`."""
    inference_precision: Inference = "f32"
    """What everything that isn't an integer is computed in; bf16 is twice as fast on CPUs that
    have it and costs about 1e-4 of cosine in narrow models, more in wide ones."""
    smooth_quant: float | None = Field(default=0.6, ge=0, le=1)
    """int8: how much of the activations' outliers moves into the weights; None: nothing."""
    group_size: int = Field(default=32, ge=8)
    """int4: weights that share a scale; divides the width of every layer."""
    calibration: int = Field(default=128, ge=1)
    """int8: number of training pairs that the ranges come from."""
    batch: int = Field(default=1, ge=1)
    """Images or texts per call, fixed in the graph."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.9999 for fp32, 0.999 for fp16, 0.98
    for int8-weights, 0.9 for int8 and int4."""

    @property
    def calibrates(self) -> bool:
        """Whether the result depends on the training data."""
        return self.precision == "int8"


class OvEncoder:
    """Both towers in OpenVINO.

    Shapes: B any number of inputs, run in calls of the graph's own batch; E embedding.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        threads: int | None,
        inference: str,
        plugin: dict[str, str] | None = None,
    ) -> None:
        settings = (device, threads, inference, plugin or {})
        self.image = _compile(folder / "image.xml", *settings)
        self.text = _compile(folder / "text.xml", *settings)
        self._image, self._text = _Graph(self.image), _Graph(self.text)

    def bind(self, tower: str) -> "_Bound":
        """One tower with its tensors in OpenVINO's own memory."""
        return _Bound(getattr(self, tower))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        return self._image(pixels.float().numpy(force=True))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        return self._text(tokens.int().numpy(force=True))


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Export both towers as a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model; nothing is left at `out` then.
    """
    ov = _openvino()
    if cfg.inference_precision not in _supported(ov):
        raise Unavailable(f"this CPU has no {cfg.inference_precision} in OpenVINO")
    schemed = cfg.precision == "int8" and clip.model.config.scheme is not None
    clip = clip if schemed else float_twin(clip)
    wanted = cfg.calibrates and not schemed
    samples = _calibration.collect(clip, cfg.calibration) if wanted else None
    scheme = clip.model.config.scheme
    plugin = FLOAT_INPUTS if scheme is not None and inputs_stay(scheme) else {}
    about = spec(cfg, samples, plugin)
    if schemed and scheme is not None:
        about.runtime["weight_bits"] = _saturation.weight_bits(scheme)
    half = cfg.precision == "fp16" or (scheme is not None and scheme.rest == "float16")
    notes: dict[str, str] = {}
    with _bundle.writing(clip, out, about) as folder:
        for tower in _bundle.TOWERS:
            source = folder / f"{tower}.onnx"
            graph = portable.graph(clip, tower, cfg.batch, portable.Config().opset)
            if schemed:
                graph, snapped = _scheme.realise(graph, clip, tower, "qdq")
                notes |= snapped
                about.runtime["not_as_the_scheme_says"] = notes
            portable.save(graph, source)
            model = ov.convert_model(source)
            if not schemed:
                model = _integers.compress(model, tower, cfg, samples)
            ov.save_model(model, folder / f"{tower}.xml", compress_to_fp16=half)
            for file in folder.glob(f"{source.name}*"):
                file.unlink()
        del graph, model  # not held while the files are checked


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> OvEncoder:
    """Open a bundle on `cpu`, `gpu` or `npu` at the precision that it was proved with.

    `threads` None leaves the choice to OpenVINO. Warns where this CPU's 8-bit sums can overflow
    with the bundle's weights.
    """
    folder = Path(folder)
    about = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    runtime = about["runtime"]
    if device == "cpu":
        _saturation.warn(folder, runtime, REMEDY)
    plugin = runtime.get("plugin", {})
    return OvEncoder(folder, device, threads, runtime["inference_precision"], plugin)


def inputs_stay(scheme: Scheme) -> bool:
    """Whether no layer's input is rounded in the range of its call."""
    return not any(entry.act == "dynamic" and entry.act_bits for entry in scheme.layers.values())


def spec(
    cfg: Config,
    samples: _calibration.Calibration | None = None,
    plugin: dict[str, str] | None = None,
) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    gate = MIN_COSINE[cfg.precision] if cfg.min_cosine is None else cfg.min_cosine
    versions = {"openvino": _openvino().__version__, "cpu": platform.machine()}
    runtime: dict[str, Any] = {
        "inference_precision": cfg.inference_precision,
        "proved_with": versions,
    }
    if cfg.precision.startswith("int8"):
        runtime["weight_bits"] = 7 if cfg.precision == "int8" and _saturation.here() else 8
    if samples:
        runtime |= {"calibration": samples.record(), "smooth_quant": cfg.smooth_quant}
    if plugin:
        runtime["plugin"] = plugin
    opener = partial(
        OvEncoder, device="cpu", threads=None, inference=cfg.inference_precision, plugin=plugin
    )
    return _bundle.Spec(
        "openvino",
        cfg.precision,
        "xml",
        cfg.batch,
        gate,
        opener,
        USAGE,
        runtime,
        requirements="openvino",
    )


def _compile(
    path: Path, device: str, threads: int | None, inference: str, plugin: dict[str, str]
) -> Any:
    ov = _openvino()
    core = ov.Core()
    if device.upper() not in core.available_devices:
        raise Unavailable(f"OpenVINO finds no {device} here")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    settings |= plugin if device == "cpu" else {}
    settings["INFERENCE_PRECISION_HINT"] = inference
    if device == "cpu":
        settings["NUM_STREAMS"] = 1
        settings |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(path, device.upper(), settings)
    found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != inference:
        raise Unavailable(f"OpenVINO computes in {found} here, the bundle is for {inference}")
    return compiled


class _Graph:
    """A compiled tower with the one request that all its queries reuse."""

    def __init__(self, compiled: Any) -> None:
        self.request, self.batch = compiled.create_infer_request(), compiled.input(0).shape[0]

    def __call__(self, rows: np.ndarray) -> Tensor:
        """rows [B, ...] -> [B, E]."""
        return _batches.run(self._once, rows, self.batch)

    def _once(self, rows: np.ndarray) -> np.ndarray:
        given = {0: np.ascontiguousarray(rows)}
        found: np.ndarray = self.request.infer(given, share_inputs=True)[0]
        return found


class _Bound:
    """A request of its own, whose tensors are set once: a query is its `infer` alone."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()

    def fill(self, rows: Tensor) -> None:
        """rows [B, ...] of the file's own batch."""
        self._request.get_input_tensor().data[:] = rows.numpy(force=True)

    def run(self) -> float:
        """Milliseconds by OpenVINO's own clock, as `benchmark_app` reads it."""
        self._request.infer(share_outputs=True)
        return float(self._request.latency)

    def embedding(self) -> np.ndarray:
        """[B, E]."""
        return np.array(self._request.get_output_tensor().data, dtype=np.float32)


def _supported(ov: Any) -> set[str]:
    names = {"FP32": "f32", "FP16": "f16", "BF16": "bf16"}
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {names[name] for name in capabilities if name in names}


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise Unavailable("openvino is not installed: pip install 'pocketclip[openvino]'") from None
    return openvino


USAGE = '''\
import openvino

core = openvino.Core()


def open_tower(tower):
    """A function from one input array to its embedding."""
    entry = bundle[tower]
    # Without the hint OpenVINO may choose bfloat16, whose embeddings differ.
    precision = bundle["runtime"]["inference_precision"]
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    settings |= bundle["runtime"].get("plugin", {})
    model = core.compile_model(entry["file"], "CPU", settings)

    def run(array):
        feed = np.repeat(array[None], entry["input"]["shape"][0], axis=0)
        return model(feed)[0][0]

    return run
'''
