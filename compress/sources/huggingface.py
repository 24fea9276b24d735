"""Dual encoders in the format of transformers: CLIP, SigLIP, SigLIP2, ChineseCLIP, AltCLIP.

FOLDER              config.json, model.safetensors, preprocessor_config.json, tokenizer.json
ORGANISATION/NAME   the same files from the hub

TinyCLIP's checkpoints on the hub are of this kind too. transformers need not be installed, and no
code of a repository is ever run.
"""

import json
from pathlib import Path
from typing import Any

from compress import atomic, clip
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.preprocess import Preprocess
from compress.sources import _checkpoint, _hf_towers, _hub, _licenses, _text_files
from compress.sources._fit import fitting
from compress.tokenizer import Tokenizer

CONFIG, PICTURES = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Pillow's numbers of the filters.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# SigLIP's tokenizer canonicalises by itself, SigLIP2 was trained on lower-cased texts.
LOWERCASED = ("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast")


def load(name: str) -> Clip:
    """Open a folder or a repository (see the top of this file).

    Raises PocketclipError for missing files, an unreachable hub, another kind of model, and weights
    that don't fit.
    """
    files = [(CONFIG,), (PICTURES,), *((file,) for file in _text_files.FILES), WEIGHTS]
    folder = Path(name) if Path(name).is_dir() else _hub.fetched(name, files)
    config = read_json(folder / CONFIG)
    structure = _hf_towers.structure(config, folder / CONFIG)
    tokenizer = _tokenizer(folder, structure.text.context_length, str(config["model_type"]))
    pictures = preprocess(
        read_json(folder / PICTURES), structure.vision.image_size, folder / PICTURES
    )
    path = weights_file(folder)
    weights = _hf_towers.renamed(config, structure, _checkpoint.read(path))
    license = str(config.get("license") or _licenses.of_card(folder))
    short = folder.resolve().name if Path(name).is_dir() else name
    step = {"step": "huggingface", "name": short, "sha256": atomic.sha256(path)}
    step |= _hub.revision(folder)
    return fitting(
        Clip(
            model=clip.build(structure, weights, path),
            preprocess=pictures,
            tokenizer=tokenizer,
            name=short,
            license=license,
            provenance=({**step, **_licenses.flags(license)},),
        )
    )


def weights_file(folder: Path) -> Path:
    """The folder's weights, safetensors first."""
    path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if path is None:
        raise PocketclipError(f"{folder}: no weights there; put {WEIGHTS[0]} beside {CONFIG}")
    return path


def is_folder(folder: Path) -> bool:
    """Whether a folder holds a dual encoder of transformers."""
    if not (folder / CONFIG).is_file():
        return False
    return read_json(folder / CONFIG).get("model_type") in _hf_towers.VISION


def preprocess(settings: dict[str, Any], image_size: int, source: Path) -> Preprocess:
    """preprocessor_config.json as our contract.

    transformers cuts the middle out with the half pixel rounded down, we round it to even (as
    torchvision): where the excess is one less than a multiple of four the crop is one pixel off.
    """
    size = settings.get("size", image_size)
    mode, found = "squash", image_size
    if isinstance(size, dict) and "shortest_edge" in size:
        mode, found = "shortest", size["shortest_edge"]
    elif isinstance(size, dict) and "height" in size:
        found = size["height"]
        if size["width"] != found:
            raise PocketclipError(f"{source}: pictures of {size} are not square")
    elif isinstance(size, int):
        mode, found = ("shortest" if settings.get("do_center_crop") else "squash"), size
    crop = settings.get("crop_size", image_size) if settings.get("do_center_crop") else found
    side = crop.get("height", crop.get("shortest_edge")) if isinstance(crop, dict) else crop
    if side != found:
        raise PocketclipError(
            f"{source}: resizes to {found} and cuts to {side}; only equal sizes are supported"
        )
    if not settings.get("do_resize", True) or not settings.get("do_rescale", True):
        raise PocketclipError(f"{source}: do_resize and do_rescale must be on")
    normal = settings.get("do_normalize", True)
    return Preprocess.model_validate(
        {
            "size": (found, found),
            "resize_mode": mode,
            "interpolation": RESAMPLE.get(settings.get("resample", 3), "bicubic"),
            "mean": tuple(settings["image_mean"]) if normal else (0.0,) * 3,
            "std": tuple(settings["image_std"]) if normal else (1.0,) * 3,
        }
    )


def _tokenizer(folder: Path, context_length: int, kind: str) -> Tokenizer:
    """The folder's tokenizer with what its class does to texts before."""
    file = _text_files.tokenizer_file(folder)
    name = str(_text_files.settings(folder).get("tokenizer_class"))
    if name.startswith("SiglipTokenizer"):
        file = _text_files.canonical(file, underscore="")
    lowercase = kind in _hf_towers.SIGMOID and name in LOWERCASED
    return _text_files.from_folder(folder, file, context_length, lowercase)


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PocketclipError(
            f"{path}: no such file; a folder of transformers holds {CONFIG}, {WEIGHTS[0]}, "
            f"{PICTURES} and {' and '.join(_text_files.FILES)}"
        ) from None
    except json.JSONDecodeError as error:
        raise PocketclipError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise PocketclipError(f"{path}: not a JSON object")
    return data
