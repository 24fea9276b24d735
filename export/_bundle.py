"""The bundle: files of both towers, with all that a stranger needs to run and check them.

An exporter puts its files into the folder that `writing` opens; everything else here is the same
for every target: contracts, goldens, parity gate, README, hashes, one rename at the end.
"""

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from compress import atomic
from compress.clip import CLASS_FILES, Clip, Encoder, save_classes
from compress.errors import GateFailed
from compress.fold import check_folded
from compress.freed import give_back
from compress.preprocess import Preprocess
from export import Unavailable, _goldens, _parity, _readme, _saturation
from export._reference import Reference, embedding_space

SCHEMA_VERSION = 1
TOWERS = ("image", "text")
INPUTS = {"image": "pixels", "text": "tokens"}
# Never plain "embedding": torch's exporter has a node of that name, and the file wouldn't load.
OUTPUTS = {"image": "image_embedding", "text": "text_embedding"}
DTYPES = {"image": "float32", "text": "int32"}

# Resampling differs by a fraction of one 8-bit step between image libraries.
MAX_PIXEL_ERROR = 0.02
# Other CPUs round sums differently: the figure written is the one met here, less this.
COSINE_SLACK = 1e-4

Opener = Callable[..., Encoder]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Spec:
    """What an exporter says of the files it writes."""

    target: str
    precision: str
    extension: str
    batch: int
    min_cosine: float
    load: Opener
    usage: str
    """Python for the README: defines `open_tower(tower)` -> function(array) -> embedding."""
    runtime: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    """The one file that holds both towers, where a format has no file for each."""
    requirements: str = "onnxruntime"
    """What `usage` imports, as pip names it."""
    diagnose: Callable[[Clip, Path, str, Tensor], str] | None = None
    """Called where the parity gate fails, with a tower and its worst input: says, as the end of a
    sentence, which layer of the files is the first to differ."""
    simulate: Callable[[Path], Encoder] | None = None
    """Computes what the files say without their runtime. Where `load` is Unavailable, parity and
    goldens are judged by it, and the bundle says `executed: false` with the reason."""
    few: bool = False
    """Whether the runtime is so slow that it computes a part of the parity gate's rows; the
    exporter judges the same files on all of them in a faster one."""
    notes: str = ""
    """More for the README, below the code."""
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What another layout names otherwise: tower -> `file`, and parts of `input` and `output`."""


@contextlib.contextmanager
def writing(clip: Clip, out: Path, spec: Spec) -> Iterator[Path]:
    """Open a folder for `image.<ext>` and `text.<ext>`; it becomes the bundle `out` at the end.

    Raises PocketclipError for a model in its training form, GateFailed if the files fall short of
    `spec.min_cosine`, and Unavailable where they can neither run nor be simulated; `out` stays as
    it was then.
    """
    check_folded(clip)
    clip = replace(clip, model=in_float(clip.model))
    with atomic.folder(Path(out)) as folder:
        clip.tokenizer.save(folder)
        if clip.classes is not None:
            save_classes(clip.classes, folder)
        yield folder
        give_back()  # what converters held, before the files are opened
        encoder, unavailable = _open(spec, folder)
        name = f"{spec.target} {spec.precision}"
        diagnose = partial(spec.diagnose, clip, folder) if spec.diagnose else None
        try:
            parity = _parity.check(clip, encoder, spec.min_cosine, name, diagnose, spec.few)
        except GateFailed as failed:
            raise GateFailed(f"{failed}{_saturation.hint(spec.runtime)}") from failed
        write_goldens(clip, encoder, folder / "golden")
        bundle = describe(clip, spec) | {"executed": unavailable is None, "parity": parity}
        if unavailable:
            bundle["unavailable"] = unavailable
        (folder / "README.md").write_text(
            _readme.text(bundle, spec.usage, spec.requirements) + spec.notes, encoding="utf-8"
        )
        write_description(folder, bundle)


def in_float(module: Module) -> Module:
    """A copy on the CPU in float32, around the same weights where they are that already.

    Its layers may be exchanged; its weights may not be changed in place.
    """
    tensors = [*module.parameters(), *module.buffers()]
    there = [t.is_cpu and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors]
    if all(there):
        return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    return copy.deepcopy(module).cpu().float()


def describe(clip: Clip, spec: Spec) -> dict[str, Any]:
    """Everything in bundle.json but what running the files adds, and the hashes."""
    bias = clip.model.logit_bias
    contract = clip.tokenizer.contract.model_dump(mode="json")
    return {
        "schema_version": SCHEMA_VERSION,
        "target": spec.target,
        "precision": spec.precision,
        "model": {
            "name": clip.name,
            "embed_dim": clip.model.config.embed_dim,
            "logit_scale": math.exp(clip.model.logit_scale.item()),
            "logit_bias": None if bias is None else bias.item(),
            "embedding_space": embedding_space(clip),
        },
        "image": tower_entry("image", spec, [3, *clip.preprocess.size], clip),
        "text": tower_entry("text", spec, [clip.tokenizer.contract.context_length], clip),
        "preprocess": clip.preprocess.bundle(),
        "tokenizer": {"file": "tokenizer.json", **contract},
        "license": clip.license,
        "provenance": list(clip.provenance),
        "runtime": spec.runtime,
        **({"classes": CLASS_FILES} if clip.classes is not None else {}),
    }


def digest(files: Mapping[str, str], name: str) -> str | None:
    """The hash that `files` gives for a file, or for all files of a package (a folder) together.

    None where it holds no such name.
    """
    if name in files:
        return files[name]
    inside = [f"{path} {files[path]}" for path in sorted(files) if path.startswith(f"{name}/")]
    joined = hashlib.sha256("\n".join(inside).encode())
    return f"sha256:{joined.hexdigest()}" if inside else None


def tower_entry(tower: str, spec: Spec, shape: list[int], clip: Clip) -> dict[str, Any]:
    """File, input and output of one tower; `shape` is that of one input."""
    own = spec.entries.get(tower, {})
    source = {"name": INPUTS[tower], "dtype": DTYPES[tower], "shape": [spec.batch, *shape]}
    output = {
        "name": OUTPUTS[tower],
        "dtype": "float32",
        "shape": [spec.batch, clip.model.config.embed_dim],
        "normalized": True,
    }
    return {
        "file": own.get("file") or spec.file or f"{tower}.{spec.extension}",
        "input": source | own.get("input", {}),
        "output": output | own.get("output", {}),
    }


def write_goldens(clip: Clip, encoder: Encoder, folder: Path) -> None:
    """Pictures, texts and what the torch model makes of them, with the cosines `encoder` met."""
    folder.mkdir()
    torch_model = Reference(clip)
    images = [
        _write_image_golden(clip.preprocess, torch_model, picture, folder / name)
        for name, picture in _goldens.pictures(clip.preprocess.size).items()
    ]
    texts, ids = [], clip.tokenizer(_goldens.TEXTS)
    for i, (text, row) in enumerate(zip(_goldens.TEXTS, torch_model.encode_text(ids))):
        np.save(folder / f"text-{i}.npy", row.numpy())
        texts.append({"text": text, "ids": ids[i].tolist(), "embedding": f"text-{i}.npy"})
    met = cosines(folder, images, texts, encoder)
    golden = {
        "images": images,
        "texts": texts,
        "min_cosine": {tower: round(value - COSINE_SLACK, 5) for tower, value in met.items()},
        "max_pixel_error": MAX_PIXEL_ERROR,
    }
    atomic.write_json(folder / "golden.json", golden)


def cosines(
    folder: Path, images: list[Any], texts: list[Any], encoder: Encoder
) -> dict[str, float]:
    """Worst cosine per tower between stored golden embeddings and what `encoder` gives now."""
    pixels = torch.stack([_array(folder / entry["pixels"]) for entry in images])
    ids = torch.tensor([entry["ids"] for entry in texts], dtype=torch.int32)
    found = {"image": encoder.encode_image(pixels), "text": encoder.encode_text(ids)}
    worst = {}
    for tower, entries in (("image", images), ("text", texts)):
        wanted = torch.stack([_array(folder / entry["embedding"]) for entry in entries])
        worst[tower] = _parity.agreement(wanted, found[tower], 1.0)["worst_cosine"]
    return worst


def write_description(folder: Path, bundle: Mapping[str, Any]) -> None:
    """Write bundle.json last, with the sha256 of every other file."""
    files = {
        path.relative_to(folder).as_posix(): f"sha256:{atomic.sha256(path)}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({**bundle, "files": files}, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "bundle.json").write_text(text + "\n", encoding="utf-8")


def _open(spec: Spec, folder: Path) -> tuple[Encoder, str | None]:
    """The files in their runtime; or simulated, with the reason."""
    try:
        return spec.load(folder), None
    except Unavailable as reason:
        if spec.simulate is None:
            raise
        return spec.simulate(folder), str(reason)


def _write_image_golden(
    preprocess: Preprocess, encoder: Encoder, picture: Image.Image, path: Path
) -> dict[str, str]:
    picture.save(path)
    with Image.open(path) as stored:
        pixels = preprocess(stored)
    files = {"pixels": f"{path.stem}.pixels.npy", "embedding": f"{path.stem}.embedding.npy"}
    np.save(path.with_name(files["pixels"]), pixels.numpy())
    np.save(path.with_name(files["embedding"]), encoder.encode_image(pixels[None])[0].numpy())
    return {"file": path.name, **files}


def _array(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))
