"""What a CLIP is here: a model with its preprocessing, tokenizer, licence and provenance."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from compress import atomic
from compress.errors import PocketclipError
from compress.model import ClipModel, fill_buffers_
from compress.preprocess import Preprocess
from compress.structure import ClipConfig
from compress.tokenizer import Tokenizer, TokenizerContract

if TYPE_CHECKING:
    from compress.work import Data

SCHEMA_VERSION = 1
CLASS_FILES = {"file": "classes.npy", "labels": "labels.json"}


class Encoder(Protocol):
    """Anything that embeds images and texts: a torch model, an exported file in its runtime."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32 -> [B, E] float32, unit length."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] int32 -> [B, E] float32, unit length."""
        ...


class Bound(Protocol):
    """One tower whose input and output stay where its runtime has them: what `encode` adds around
    the runtime is left out, as in the benchmarks that runtimes bring themselves.

    An encoder may offer `bind(tower) -> Bound`. Shapes: B the file's own batch, E embedding.
    """

    def fill(self, rows: Tensor) -> None:
        """Put pixels [B, 3, H, W] or tokens [B, L] where the runtime reads its input."""
        ...

    def run(self) -> float | None:
        """Compute the embedding of what was filled in -> milliseconds, where the runtime has a
        clock of its own: calling it from Python is then left out.
        """
        ...

    def embedding(self) -> NDArray[np.float32]:
        """[B, E] of the last run, as a copy."""
        ...


@dataclass(frozen=True)
class Classes:
    """Fixed prompts, embedded once: what an image is compared with."""

    names: tuple[str, ...]
    embeddings: Tensor
    """[C, E] float32, unit length, in the order of the names."""


@dataclass(frozen=True)
class Clip:
    """A dual encoder with all it needs to be used by a stranger."""

    model: ClipModel
    preprocess: Preprocess
    tokenizer: Tokenizer
    name: str
    license: str
    provenance: tuple[dict[str, Any], ...] = ()
    data: "Data | None" = None
    """The recipe's data while it runs, for exporters that calibrate; never saved."""
    classes: Classes | None = None
    """Fixed prompts as embeddings of this very model (the exact stage makes them)."""

    def with_model(self, model: ClipModel, step: dict[str, Any]) -> "Clip":
        """The same contracts around another model, with one more line of provenance.

        A class matrix would no longer be that of the model, and is dropped.
        """
        return replace(self, model=model, provenance=(*self.provenance, step), classes=None)


class TorchEncoder:
    """A `Clip` as an `Encoder`: evaluation mode, no gradients, unit embeddings."""

    def __init__(self, clip: Clip) -> None:
        self.model = clip.model.eval()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.encode_image(pixels), dim=-1)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(tokens), dim=-1)


def save(clip: Clip, folder: Path) -> None:
    """Write model.json, model.safetensors and tokenizer.json; model.json last, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in clip.model.state_dict().items()}
    atomic.write_bytes(folder / "model.safetensors", serialise(state))
    clip.tokenizer.save(folder)
    if clip.classes is not None:
        save_classes(clip.classes, folder)
    contract = clip.tokenizer.contract.model_dump(mode="json")
    atomic.write_json(
        folder / "model.json",
        {
            "schema_version": SCHEMA_VERSION,
            "name": clip.name,
            "license": clip.license,
            "provenance": list(clip.provenance),
            "model": clip.model.config.model_dump(mode="json"),
            "preprocess": clip.preprocess.model_dump(mode="json"),
            "tokenizer": {"file": "tokenizer.json", **contract},
            **({"classes": CLASS_FILES} if clip.classes is not None else {}),
        },
    )


def save_classes(classes: Classes, folder: Path) -> None:
    """Write the class matrix and its labels."""
    buffer = io.BytesIO()
    np.save(buffer, classes.embeddings.numpy(force=True).astype(np.float32))
    atomic.write_bytes(folder / CLASS_FILES["file"], buffer.getvalue())
    atomic.write_json(folder / CLASS_FILES["labels"], list(classes.names))


def load_classes(folder: Path) -> Classes:
    """Read what `save_classes` wrote."""
    matrix, labels = (folder / CLASS_FILES[key] for key in ("file", "labels"))
    try:
        embeddings = torch.from_numpy(np.load(matrix, allow_pickle=False))
        return Classes(tuple(json.loads(labels.read_text(encoding="utf-8"))), embeddings)
    except (OSError, ValueError) as error:
        raise PocketclipError(f"{matrix}: not a class matrix with labels ({error})") from None


def describe(folder: Path) -> tuple[ClipConfig, dict[str, Any]]:
    """Read and check model.json without touching the weights."""
    path = folder / "model.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            found = data["schema_version"]
            raise PocketclipError(
                f"{path}: schema_version {found}, this version reads {SCHEMA_VERSION}; "
                "open it with the version that wrote it, or export it again"
            )
        return ClipConfig.model_validate(data["model"]), data
    except FileNotFoundError:
        raise PocketclipError(f"{path}: no such file; a model folder holds model.json") from None
    except (json.JSONDecodeError, KeyError, ValidationError) as error:
        raise PocketclipError(f"{path}: not a model description: {error}") from None


def load(folder: Path) -> Clip:
    """Open a model folder written by `save`; every tensor must be there and fit."""
    config, data = describe(folder)
    tokenizer = dict(data["tokenizer"])
    file = folder / tokenizer.pop("file")
    model = build(config, read_weights(folder / "model.safetensors"), folder / "model.safetensors")
    return Clip(
        model=model,
        preprocess=Preprocess.model_validate(data["preprocess"]),
        tokenizer=Tokenizer.load(file, TokenizerContract.model_validate(tokenizer)),
        name=data["name"],
        license=data["license"],
        provenance=tuple(data["provenance"]),
        classes=load_classes(folder) if "classes" in data else None,
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file as stored, mapped from it rather than copied."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise PocketclipError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise PocketclipError(
            f"{path}: damaged weights ({error}); copy or train them again"
        ) from None


def build(config: ClipConfig, state: dict[str, Tensor], source: Path | str) -> ClipModel:
    """A model of this structure holding these tensors as float32; any difference is named.

    Names and shapes are compared before anything is allocated.
    """
    with torch.device("meta"):
        model = ClipModel(config)
    expected = model.state_dict()
    problems = _differences(expected, state)
    if problems:
        raise PocketclipError(f"{source}: weights do not fit the model: " + "; ".join(problems))
    for name, tensor in expected.items():
        expected[name] = state[name].to(tensor.dtype)
    model.load_state_dict(expected, strict=True, assign=True)
    fill_buffers_(model)
    return model.eval()


def _differences(expected: dict[str, Tensor], state: dict[str, Tensor]) -> Sequence[str]:
    missing = [f"{name} is missing" for name in expected if name not in state]
    unknown = [f"{name} is unknown" for name in state if name not in expected]
    wrong = [
        f"{name} has shape {tuple(state[name].shape)}, the model needs {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong += [f"{name} is complex" for name, tensor in state.items() if tensor.is_complex()]
    problems = wrong + missing + unknown
    return [*problems[:4], f"and {len(problems) - 4} more"] if len(problems) > 5 else problems
