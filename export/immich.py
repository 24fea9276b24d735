"""Immich's model folder: `visual/` and `textual/` with a graph each, for its own photo search.

Copy the folder's content to where Immich keeps a model that it knows (`clip/NAME` in its model
cache) and choose that NAME in its settings; the server holds the width of each known model's
embeddings, so NAME must be one of equal width. Photos have to be searched in again afterwards.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.support import reason
from export import _bundle
from export import onnx as portable
from export._tokenizer import as_json, self_contained

VERSION = 1
REQUIRES = ""

FILES = {"image": "visual/model.onnx", "text": "textual/model.onnx"}
INPUTS = {"image": "image", "text": "text"}


class Config(BaseModel):
    """Settings of Immich's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    opset: int = Field(default=20, ge=20, le=23)
    """ONNX operator set."""
    min_cosine: float = Field(default=0.9999, ge=-1, le=1)
    """Parity gate: the worst cosine to the torch model that either tower may show."""


def write(clip: Clip, cfg: Config, out: Path) -> None:
    """Write Immich's files with a bundle's contracts and goldens beside them.

    Raises PocketclipError for preprocessing that Immich doesn't do.
    """
    description, preprocess = model_config(clip), preprocess_config(clip)
    tokenizer, settings = self_contained(clip)
    with _bundle.writing(clip, out, spec(cfg)) as folder:
        for tower, file in FILES.items():
            (folder / file).parent.mkdir()
            graph = portable.graph(clip, tower, 1, cfg.opset)
            portable.rename_(graph, {_bundle.INPUTS[tower]: INPUTS[tower]})
            portable.save(graph, folder / file)
        (folder / "textual/tokenizer.json").write_text(tokenizer, encoding="utf-8")
        for name, content in (
            ("config.json", description),
            ("visual/preprocess_cfg.json", preprocess),
            ("textual/tokenizer_config.json", settings),
        ):
            (folder / name).write_text(as_json(content), encoding="utf-8")


def refuses(clip: Clip) -> str | None:
    """What of a model's contracts Immich doesn't do."""
    return reason(lambda: (preprocess_config(clip), self_contained(clip)))


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> portable.OrtEncoder:
    """Open the graphs in ONNX Runtime, as Immich does."""
    return portable.OrtEncoder(Path(folder), device, threads, FILES)


def spec(cfg: Config) -> _bundle.Spec:
    """What the bundle's pages say of this target."""
    runtime = portable.runtime(portable.Config(opset=cfg.opset))
    entries = {
        tower: {"file": FILES[tower], "input": {"name": name}} for tower, name in INPUTS.items()
    }
    return _bundle.Spec(
        "immich",
        "fp32",
        "onnx",
        1,
        cfg.min_cosine,
        load,
        portable.USAGE,
        runtime,
        entries=entries,
    )


def model_config(clip: Clip) -> dict[str, Any]:
    """config.json: what Immich reads of open_clip's description."""
    contract = clip.tokenizer.contract
    return {
        "embed_dim": clip.model.config.embed_dim,
        "vision_cfg": {"image_size": clip.preprocess.size[0]},
        "text_cfg": {
            "context_length": contract.context_length,
            "vocab_size": clip.model.config.text.vocab_size,
        },
    }


def preprocess_config(clip: Clip) -> dict[str, Any]:
    """visual/preprocess_cfg.json; Immich shows what lies under transparent pixels, not white."""
    ours = clip.preprocess
    if ours.resize_mode == "longest" or ours.size[0] != ours.size[1]:
        raise PocketclipError(
            f"immich: it makes squares by cropping or squashing, not {ours.size} by "
            f"{ours.resize_mode}"
        )
    return {
        "size": list(ours.size),
        "mode": "RGB",
        "mean": list(ours.mean),
        "std": list(ours.std),
        "interpolation": ours.interpolation,
        "resize_mode": ours.resize_mode,
    }
