"""ONNX Runtime: the portable graph in float32, or rewritten for its narrower operators."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.clip import Clip
from compress.scheme import Scheme
from compress.twin import float_twin
from export import _bundle, _calibration, _saturation, _whole
from export import onnx as portable

VERSION = 1
REQUIRES = ""
HONOURS_SCHEME = True

Precision = Literal["fp32", "fp16", "int8", "int8-static", "int4"]
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98, "int8-static": 0.9, "int4": 0.9}
REMEDY = "export with reduce_range: true (a scheme: quantize with weight_bits: 7)"


class Config(BaseModel):
    """Settings of the ONNX Runtime files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Precision = "fp32"
    """fp32: the portable graph. fp16: for GPUs, norms and softmax stay in float32. int8: weights,
    patch projection and token table in 8 bits (one scale per column, per row for the table),
    activations quantized as they come; of a model with a scheme what the scheme says, as near as
    this runtime has it. int8-static: symmetric QDQ with fixed ranges. int4: matrices in 4 bits, a
    scale per 32 weights."""
    format: Literal["onnx", "ort"] = "onnx"
    """ort: the flat format of reduced mobile builds, optimised when it is written."""
    calibration: int = Field(default=128, ge=1)
    """int8-static: number of training pairs that the ranges come from."""
    batch: int = Field(default=1, ge=1)
    """Images or texts per call, fixed in the graph. In int8 all inputs of one call share a scale,
    so that with more than 1 an embedding depends, by a rounding error, on its neighbours."""
    reduce_range: bool | None = None
    """int8 with 7-bit weights, for x86 CPUs without VNNI, where 8-bit sums overflow; None: where
    the CPU that writes the file is one, as its parity could not be shown there otherwise. With a
    scheme, `quantize: {weight_bits: 7}` says it."""
    takes_pictures: bool = False
    """Whether the image file takes uint8 RGB pictures of any size [height, width, 3], resized,
    cropped and normalised inside within 2 grey levels of the contract."""
    takes_texts: bool = False
    """Whether the text file takes strings; onnxruntime-extensions is needed wherever it runs."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.9999 for fp32, 0.999 for fp16, 0.98 for
    int8, 0.9 for int8-static and int4."""

    @model_validator(mode="after")
    def _whole_files_are_plain(self) -> "Config":
        if self.whole and (self.batch > 1 or self.format == "ort"):
            raise ValueError("takes_pictures and takes_texts need batch 1 and format onnx")
        return self

    @property
    def whole(self) -> tuple[str, ...]:
        """Towers whose file takes what people have, rather than what the contract makes of it."""
        wanted = {"image": self.takes_pictures, "text": self.takes_texts}
        return tuple(tower for tower in _bundle.TOWERS if wanted[tower])

    @property
    def calibrates(self) -> bool:
        """Whether the result depends on the training data."""
        return self.precision == "int8-static"


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Export both towers as a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model; nothing is left at `out` then.
    """
    from export import _scheme

    if cfg.reduce_range is None:
        cfg = cfg.model_copy(update={"reduce_range": _saturation.here()})
    schemed = cfg.precision == "int8" and clip.model.config.scheme is not None
    clip = clip if schemed else float_twin(clip)
    samples = _calibration.collect(clip, cfg.calibration) if cfg.calibrates else None
    about = spec(cfg, clip.model.config.scheme, samples)
    if cfg.whole:
        about = replace(about, **_whole_spec(clip, cfg))
    notes: dict[str, str] = {}
    if schemed:
        about.runtime["not_as_the_scheme_says"] = notes
    with _bundle.writing(clip, out, about) as folder:
        for tower in _bundle.TOWERS:
            graph = portable.graph(clip, tower, cfg.batch, portable.Config().opset)
            if schemed:
                graph, snapped = _scheme.realise(graph, clip, tower, "onnxruntime")
                notes |= snapped
            else:
                graph = narrowed(graph, cfg, samples.rows(tower) if samples else [])
            if tower in cfg.whole:
                _whole.attach_(graph, clip, tower)
            portable.save(graph, folder / f"{tower}.onnx")
            if cfg.format == "ort":
                _flat(folder, tower)
        del graph  # not held while the files are checked
        if cfg.whole:
            proved = _whole.prove(clip, folder, cfg.whole, about.min_cosine)
            about.runtime["whole"] = proved


def narrowed(graph: Any, cfg: Config, rows: list[np.ndarray]) -> Any:
    """The float graph of a tower in the precision of `cfg`; rows: inputs to calibrate on."""
    from export import _int8, _narrow

    if cfg.precision == "int8":
        assert cfg.reduce_range is not None, "write() decides it"
        limit = _int8.REDUCED_RANGE if cfg.reduce_range else _int8.FULL_RANGE
        return _int8.rewrite(graph, limit)
    if cfg.precision == "int8-static":
        calls = [np.repeat(row, cfg.batch, axis=0) for row in rows]
        return _narrow.static(graph, calls, bool(cfg.reduce_range))
    if cfg.precision == "int4":
        return _narrow.four_bits(graph)
    return _narrow.half(graph) if cfg.precision == "fp16" else graph


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> portable.OrtEncoder:
    """Open a bundle in ONNX Runtime; `threads` None leaves the choice to it.

    Warns where this CPU's 8-bit sums can overflow with the bundle's weights.
    """
    folder = Path(folder)
    about = folder / "bundle.json"
    bundle = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    _saturation.warn(folder, bundle.get("runtime", {}), REMEDY)
    flat = (folder / "image.ort").exists()
    files = {tower: f"{tower}.ort" for tower in _bundle.TOWERS} if flat else portable.FILES
    shapes = _whole.shapes(bundle) if bundle else {}
    return _opened(folder, device, threads, files, shapes)


def _opened(
    folder: Path,
    device: str = "cpu",
    threads: int | None = None,
    files: Mapping[str, str] = portable.FILES,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> portable.OrtEncoder:
    """The towers; of files that take pictures or texts what stands behind that."""
    found: dict[str, str | bytes] = dict(files)
    for tower, shape in (shapes or {}).items():
        found[tower] = _whole.detached(folder / files[tower], tower, shape)
    return portable.OrtEncoder(folder, device, threads, found)


def _whole_spec(clip: Clip, cfg: Config) -> dict[str, Any]:
    """What the bundle's pages say otherwise of files that take pictures or texts."""
    contract = clip.tokenizer.contract
    sizes = {"image": [1, 3, *clip.preprocess.size], "text": [1, contract.context_length]}
    return {
        "load": partial(_opened, shapes={tower: sizes[tower] for tower in cfg.whole}),
        "usage": _whole.USAGE,
        "entries": _whole.entries(cfg.whole),
        "requirements": "onnxruntime" + " onnxruntime-extensions" * cfg.takes_texts,
        "diagnose": None,
    }


def spec(
    cfg: Config, scheme: Scheme | None = None, samples: _calibration.Calibration | None = None
) -> _bundle.Spec:
    """What the bundle's pages say of this target; with a scheme, which precision it is."""
    gate = MIN_COSINE[cfg.precision] if cfg.min_cosine is None else cfg.min_cosine
    runtime = portable.runtime(portable.Config())
    if samples:
        runtime["calibration"] = samples.record()
    if scheme is not None:
        runtime["scheme"] = scheme.label
        runtime["weight_bits"] = _saturation.weight_bits(scheme)
    elif cfg.precision.startswith("int8"):
        runtime["weight_bits"] = 7 if cfg.reduce_range else 8
    diagnose = partial(portable.diagnose, batch=cfg.batch, min_cosine=gate)
    return _bundle.Spec(
        "onnxruntime",
        cfg.precision,
        cfg.format,
        cfg.batch,
        gate,
        load,
        portable.USAGE,
        runtime,
        diagnose=diagnose if cfg.format == "onnx" else None,
    )


def _flat(folder: Path, tower: str) -> None:
    """Replace a tower's .onnx file by the .ort file that ONNX Runtime makes of it.

    Layouts of this very CPU (blocked channels) are left out, so that it runs on any.
    """
    import onnxruntime

    source = folder / f"{tower}.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(source.with_suffix(".ort"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, disabled_optimizers=["NchwcTransformer"])
    for file in folder.glob(f"{source.name}*"):
        file.unlink()
