"""Models of open_clip, by the names that people use for them.

ViT-B-32/laion2b_s34b_b79k    a published checkpoint, fetched from the hub
ViT-B-32@weights.safetensors  an architecture of open_clip with weights in a file
ViT-B-32/random               an architecture of open_clip with random weights
hf-hub:ORGANISATION/NAME      a repository of the hub in open_clip's format
local-dir:FOLDER              a folder in open_clip's format
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import atomic
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipModel, initialise_
from compress.sources import _checkpoint, _hub, _licenses, _mobileclip
from compress.sources import _open_clip as theirs
from compress.sources._fit import fitting
from compress.sources._text_files import FILES as TOKENIZER_FILES

CONFIG = "open_clip_config.json"
PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color", "size")
PREFERRED_WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Found:
    """What a name stands for, before anything is converted."""

    name: str
    """Short name of the model, without places on this machine."""
    model_cfg: dict[str, Any]
    """open_clip's `model_cfg`: the structure, checked to be one that we can hold."""
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)
    """open_clip's `preprocess_cfg`, where it differs from open_clip's defaults."""
    weights: Path | None = None
    """The checkpoint; None for random weights."""
    folder: Path | None = None
    """Folder that holds tokenizer.json, if the model has a tokenizer of its own."""
    license: str = _licenses.UNKNOWN
    """As the source states it."""


def load(name: str) -> Clip:
    """Open a model by name (see the top of this file).

    Raises PocketclipError for unknown names, missing files, an unreachable hub, towers that nobody
    here can build, and weights that don't fit.
    """
    found = find(name)
    structure = theirs.config(found.model_cfg, found.name)
    tokenizer = theirs.tokenizer(found.model_cfg["text_cfg"], found.folder, found.name)
    step: dict[str, Any] = {"step": "open_clip", "name": found.name}
    license = found.license
    if found.weights is None:
        model = ClipModel(structure)
        initialise_(model)
    else:
        weights = _checkpoint.read(found.weights)
        if _mobileclip.is_apples(weights):
            license = _licenses.RESEARCH if license == _licenses.UNKNOWN else license
            weights = _mobileclip.renamed(weights, theirs.trunk(structure, found.weights))
        model = theirs.convert(found.model_cfg, weights, found.weights)
        step |= {"sha256": atomic.sha256(found.weights), **_hub.revision(found.weights.parent)}
    clip = Clip(
        model=model.eval(),
        preprocess=theirs.preprocess(found.preprocess_cfg, structure.vision.image_size),
        tokenizer=tokenizer,
        name=found.name,
        license=license,
        provenance=({**step, **_licenses.flags(license)},),
    )
    return fitting(clip)


def find(name: str) -> Found:
    """Resolve a name to a config and files, fetching from the hub what isn't here."""
    if name.startswith("local-dir:"):
        return _find_folder(Path(name.removeprefix("local-dir:")))
    if name.startswith("hf-hub:"):
        return _find_repository(name.removeprefix("hf-hub:"))
    architecture, at, file = name.partition("@")
    if at:
        model_cfg = architecture_cfg(architecture)
        if not Path(file).is_file():
            raise PocketclipError(f"{file}: no such file (weights for {architecture})")
        folder = Path(file).parent if model_cfg["text_cfg"].get("hf_tokenizer_name") else None
        return Found(architecture, model_cfg, _preprocess(architecture), Path(file), folder)
    architecture, slash, tag = name.rpartition("/")
    return _find_published(architecture, tag) if slash else _find_published(name, "")


def architecture_cfg(architecture: str) -> dict[str, Any]:
    """The `model_cfg` that open_clip has for a name; PocketclipError with the nearest names."""
    import open_clip

    model_cfg = open_clip.get_model_config(architecture.replace("/", "-"))
    if model_cfg is None:
        known = open_clip.list_models()
        near = difflib.get_close_matches(architecture, known, 4, 0.3)
        raise PocketclipError(
            f"open_clip has no architecture {architecture!r}; nearest: {', '.join(near) or 'none'}"
        )
    return _plain(model_cfg, architecture)


def _plain(model_cfg: dict[str, Any], source: Path | str) -> dict[str, Any]:
    """The same; refused before anything large is fetched unless our towers can hold it."""
    theirs.config(model_cfg, source)
    return model_cfg


def _find_folder(folder: Path) -> Found:
    """A folder with open_clip_config.json, weights, and tokenizer files if it has its own."""
    if not (folder / CONFIG).is_file():
        raise PocketclipError(f"{folder / CONFIG}: no such file; open_clip's folders hold one")
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    weights = [path for kind in kinds for path in sorted(folder.glob(kind))]
    preferred = [folder / file for file in PREFERRED_WEIGHTS if folder / file in weights]
    if not weights:
        raise PocketclipError(
            f"{folder}: no weights there; put {PREFERRED_WEIGHTS[0]} beside {CONFIG}"
        )
    return _described(folder / CONFIG, folder.resolve().name, [*preferred, *weights][0])


def _find_repository(repository: str) -> Found:
    """A repository of the hub in open_clip's format."""
    path = _fetch(repository, CONFIG)
    _hub.optional(repository, _hub.CARD)
    found = _described(path, repository, None)
    for file in TOKENIZER_FILES if found.folder else ():
        _fetch(repository, file)
    return _described(path, repository, _fetch(repository, PREFERRED_WEIGHTS[2]))


def _described(path: Path, name: str, weights: Path | None) -> Found:
    """What an open_clip_config.json says; a `license` beside `model_cfg` is ours, not theirs."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model_cfg = _plain(data["model_cfg"], path)
        preprocess_cfg = data.get("preprocess_cfg", {})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise PocketclipError(f"{path}: not an open_clip config: {error}") from None
    own_tokenizer = model_cfg["text_cfg"].get("hf_tokenizer_name")
    license = data.get("license") or _licenses.of_card(path.parent)
    folder = path.parent if own_tokenizer else None
    return Found(name, model_cfg, preprocess_cfg, weights, folder, license)


def _find_published(architecture: str, tag: str) -> Found:
    """A published checkpoint of a named architecture; the tag "random" needs none."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    model_cfg = architecture_cfg(architecture)
    if tag == "random":
        license = "none: random weights"
        preprocess_cfg = _preprocess(architecture)
        return Found(f"{architecture}/random", model_cfg, preprocess_cfg, license=license)
    published = get_pretrained_cfg(architecture.replace("/", "-"), tag)
    if not published:
        tags = ", ".join([*list_pretrained_tags_by_model(architecture), "random"])
        raise PocketclipError(
            f"{architecture}: no weights named {tag!r}; there are {tags}; "
            f"weights of your own: {architecture}@FILE"
        )
    # The weights decide: trained with QuickGELU, they are wrong under any other activation.
    model_cfg["quick_gelu"] = published.get("quick_gelu", model_cfg.get("quick_gelu", False))
    weights = _fetch_published(architecture, published)
    folder = None
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):
        folder = _fetch_tokenizer(model_cfg["text_cfg"]["hf_tokenizer_name"])
    name, license = f"{architecture}/{tag}", _licenses.of_tag(tag)
    return Found(name, model_cfg, published, weights, folder, license)


def _fetch_tokenizer(repository: str) -> Path:
    """The folder that holds the tokenizer which a config names."""
    files = [_fetch(repository, file) for file in TOKENIZER_FILES]
    return files[0].parent


def _preprocess(architecture: str) -> dict[str, Any]:
    """How pictures become pixels for an architecture's published weights, where all agree.

    The OpenAI values of open_clip's default suit most; SigLIP and MobileCLIP have their own.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    name = architecture.replace("/", "-")
    found = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    kept = [{k: v for k, v in cfg.items() if k in PREPROCESS} for cfg in found]
    return kept[0] if kept and all(cfg == kept[0] for cfg in kept) else {}


def _fetch(repository: str, file: str) -> Path:
    """A file of a hub repository; open_clip takes the .safetensors twin of a .bin if there is."""
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        return Path(download_pretrained_from_hf(repository, filename=file))
    except (OSError, ValueError) as error:
        raise PocketclipError(
            f"hf-hub:{repository}: cannot fetch {file} ({_first_line(error)}); "
            f"without the hub, copy {CONFIG}, {PREFERRED_WEIGHTS[0]} and any tokenizer files of "
            "that repository into a folder and name the folder instead: local-dir:FOLDER"
        ) from None


def _fetch_published(architecture: str, published: Mapping[str, Any]) -> Path:
    """The checkpoint of a tag, from the hub or the address that open_clip knows."""
    from open_clip.pretrained import download_pretrained

    try:
        return Path(download_pretrained(dict(published)))
    except (OSError, ValueError, RuntimeError) as error:
        place = published.get("hf_hub") or published.get("url")
        raise PocketclipError(
            f"{architecture}: cannot fetch its weights ({_first_line(error)}); "
            f"without the hub, copy the weights from {place} and name the file: {architecture}@FILE"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
