"""Core ML for Apple devices: an .mlpackage for each tower, weights in 16, 8, 6 or 4 bits.

Shapes are static, as anything else leaves the Neural Engine. The image tower takes a picture
(CVPixelBuffer): scale and mean are Core ML's own, and the standard deviation, for which it has one
number where CLIP needs three, is folded into the patch projection.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import platform
import uuid
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.clip import Clip
from compress.model import ImageTower
from compress.preprocess import Preprocess
from export import Unavailable, _batches, _bundle
from export import onnx as portable
from export._mil import MACOS, SimulatedEncoder, raw

VERSION = 1
REQUIRES = "coreml"

MIN_COSINE = {"fp16": 0.999, "w8": 0.998, "w6": 0.98, "w4": 0.8}
# The length of an embedding is a sum of squares, and its guard against 0 is no half.
FLOAT32 = ("reduce_l2_norm", "reduce_sum_square", "clip", "maximum", "tile", "real_div", "sqrt")
# Columns that share a table of 16 values; older systems have one table for a whole matrix.
GROUP = 16


class Config(BaseModel):
    """Settings of the Core ML packages."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: Literal["fp16", "w8", "w6", "w4"] = "fp16"
    """Arithmetic is half precision but for the final normalisation. fp16: weights too. w8: a scale
    per column. w6, w4: tables of 64 or 16 values (k-means), for 16 columns each from iOS 18 on."""
    input: Literal["image", "pixels"] = "image"
    """image: a picture of the input's size, 8 bits a colour, resized and cropped as the contract
    says. pixels: an array, normalised as for every other target."""
    ios: Literal[16, 17, 18] = 18
    """Oldest system: iOS 16 and macOS 13, 17 and 14, or 18 and 15."""
    min_cosine: float | None = Field(default=None, ge=-1, le=1)
    """Parity gate, worst cosine to the torch model; None: 0.999 for fp16, 0.998 for w8, 0.98 for
    w6, 0.8 for w4."""


class MlEncoder:
    """Both towers in Core ML, one input a call.

    Shapes: B any number of inputs, E embedding.
    """

    def __init__(self, folder: Path, units: Any, preprocess: Preprocess | None) -> None:
        """preprocess: that of a bundle whose image tower takes pictures."""
        import coremltools as ct

        self.preprocess = preprocess
        self.image, self.text = (
            ct.models.MLModel(str(folder / f"{tower}.mlpackage"), compute_units=units)
            for tower in _bundle.TOWERS
        )

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32, normalised -> [B, E] float32, unit length."""
        return _batches.run(self._image, pixels.float().numpy(force=True), batch=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        call = lambda row: self.text.predict({"tokens": row})["text_embedding"]  # noqa: E731
        return _batches.run(call, tokens.to(torch.int32).numpy(force=True), batch=1)

    def _image(self, row: np.ndarray) -> np.ndarray:
        feed: Any = row
        if self.preprocess:
            bits = raw(torch.from_numpy(row), self.preprocess)[0].round().clamp(0, 255)
            feed = Image.fromarray(bits.permute(1, 2, 0).to(torch.uint8).numpy())
        found: np.ndarray = self.image.predict({"pixels": feed})["image_embedding"]
        return found


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Convert both towers into a whole bundle at `out`.

    Raises GateFailed if the files disagree with the torch model, Unavailable without coremltools or
    where it lacks an operator of this model. Away from macOS parity is simulated.
    """
    _require()
    with _bundle.writing(clip, out, spec(clip, cfg)) as folder:
        for tower in _bundle.TOWERS:
            package = folder / f"{tower}.mlpackage"
            with _quiet():
                model = compressed(convert(clip, tower, cfg), cfg)
                model.short_description = f"{clip.name}, {tower} tower, {cfg.precision}"
                model.license = clip.license
                model.save(str(package))
            name_by_content_(package)
        del model  # not held while the files are checked


def load(folder: Path, device: str = "all", threads: int | None = None) -> MlEncoder:
    """Open a bundle on a Mac; `device` is all, cpu, gpu or npu, the units that Core ML may use."""
    _require()
    about = json.loads((Path(folder) / "bundle.json").read_text(encoding="utf-8"))
    takes_pictures = about["image"]["input"]["dtype"] == "uint8"
    preprocess = Preprocess.from_bundle(about["preprocess"]) if takes_pictures else None
    return _open(Path(folder), device, preprocess)


def spec(clip: Clip, cfg: Config) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    import coremltools

    gate = MIN_COSINE[cfg.precision] if cfg.min_cosine is None else cfg.min_cosine
    preprocess = clip.preprocess if cfg.input == "image" else None
    picture = {"dtype": "uint8", "color": "RGB", "in_graph": ["rescale", "mean", "std"]}
    return _bundle.Spec(
        "coreml",
        cfg.precision,
        "mlpackage",
        1,
        gate,
        partial(_open, device="all", preprocess=preprocess),
        USAGE,
        {"ios": cfg.ios, "proved_with": {"coremltools": coremltools.__version__}},
        requirements="coremltools",
        simulate=partial(SimulatedEncoder, preprocess=preprocess),
        entries={"image": {"input": picture}} if cfg.input == "image" else {},
    )


class _Scaled(nn.Module):
    """A tower that multiplies its pixels with `scale` [1, 3, 1, 1] first."""

    scale: Tensor

    def __init__(self, tower: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x * self.scale)


def convert(clip: Clip, tower: str, cfg: Config) -> Any:
    """One tower, normalised -> an MLModel in half precision that isn't loaded."""
    import coremltools as ct

    module, example = portable.unit(clip, tower), portable.example(clip, tower, batch=1)
    kind = np.int32 if tower == "text" else np.float32
    source = ct.TensorType(name=_bundle.INPUTS[tower], shape=example.shape, dtype=kind)
    if tower == "image" and cfg.input == "image":
        scale = fold_std_(module.get_submodule("tower"), clip.preprocess)
        module = module if scale is None else _Scaled(module, scale)
        bias = [-value for value in clip.preprocess.mean]
        source = ct.ImageType(name="pixels", shape=example.shape, scale=1 / 255, bias=bias)
    whole = ct.transform.FP16ComputePrecision(op_selector=lambda op: op.op_type not in FLOAT32)
    try:
        return ct.convert(
            exported(module.eval(), example),
            inputs=[source],
            outputs=[ct.TensorType(name=_bundle.OUTPUTS[tower], dtype=np.float32)],
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, f"iOS{cfg.ios}"),
            compute_precision=whole,
            skip_model_load=True,
        )
    except NotImplementedError as error:
        raise Unavailable(f"Core ML cannot take the {tower} tower: {error}") from error


def fold_std_(module: nn.Module, preprocess: Preprocess) -> Tensor | None:
    """Let a tower take pixels of which only the mean was subtracted, in place.

    -> None, or [1, 3, 1, 1] to multiply with, where there is no patch projection to fold it into.
    """
    scale = 1 / torch.tensor(preprocess.std).view(1, 3, 1, 1)
    if not isinstance(module, ImageTower):
        return scale
    weight = module.patch.weight.detach() * scale
    module.patch.weight = nn.Parameter(weight, requires_grad=False)
    return None


def exported(module: nn.Module, example: Tensor) -> Any:
    """A torch.export program without the `alias` that coremltools doesn't know."""
    alias = {torch.ops.aten.alias.default: lambda x: x}
    with torch.no_grad():
        return torch.export.export(module, (example,)).run_decompositions(alias)


def compressed(model: Any, cfg: Config) -> Any:
    """An MLModel -> the same with weights of fewer bits, or itself."""
    import coremltools.optimize.coreml as optimize

    if cfg.precision == "fp16":
        return model
    if cfg.precision == "w8":
        settings = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
        config = optimize.OptimizationConfig(global_config=settings)
        return optimize.linear_quantize_weights(model, config)
    grouped = {"granularity": "per_grouped_channel", "group_size": GROUP} if cfg.ios >= 18 else {}
    settings = optimize.OpPalettizerConfig(nbits=int(cfg.precision[1:]), mode="kmeans", **grouped)
    return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=settings))


def name_by_content_(package: Path) -> None:
    """Give a package's parts identifiers that follow from their paths, so that equal models are
    equal files; coremltools draws them at random."""
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    entries = manifest["itemInfoEntries"]
    names = {
        old: str(uuid.uuid5(uuid.NAMESPACE_URL, f"pocketclip:{entry['path']}")).upper()
        for old, entry in entries.items()
    }
    manifest["itemInfoEntries"] = {names[old]: entry for old, entry in entries.items()}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _open(folder: Path, device: str, preprocess: Preprocess | None) -> MlEncoder:
    if platform.system() != "Darwin":
        raise Unavailable(MACOS)
    import coremltools as ct

    names = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "npu": "CPU_AND_NE"}
    if device not in names:
        raise Unavailable(f"Core ML has no device {device!r}: one of {', '.join(names)}")
    return MlEncoder(folder, ct.ComputeUnit[names[device]], preprocess)


def _require() -> None:
    if importlib.util.find_spec("coremltools") is None:
        raise Unavailable("coremltools is not installed: pip install 'pocketclip[coreml]'")
    with _quiet():  # away from macOS it warns of each part that it lacks
        importlib.import_module("coremltools")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice while converting."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


USAGE = '''\
import coremltools


def open_tower(tower):
    """A function from one input array to its embedding; needs a Mac."""
    entry = bundle[tower]
    model = coremltools.models.MLModel(entry["file"])

    def run(array):
        feed = array[None]
        if entry["input"]["dtype"] == "uint8":  # Core ML normalises pictures itself
            spec = bundle["preprocess"]
            array = array.transpose(1, 2, 0) * np.float32(spec["std"]) + np.float32(spec["mean"])
            feed = Image.fromarray((array / spec["rescale"]).round().clip(0, 255).astype(np.uint8))
        return model.predict({entry["input"]["name"]: feed})[entry["output"]["name"]][0]

    return run
'''
