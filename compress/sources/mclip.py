"""Multilingual text towers beside the image tower that they were trained towards.

TEXT+IMAGE    M-CLIP/XLM-Roberta-Large-Vit-B-32+open_clip:ViT-B-32/openai

TEXT is a folder or a repository of the hub: M-CLIP's (an encoder, a mean over tokens, and a layer
`LinearTransformation`), or one of sentence-transformers with the same parts (modules.json). It
holds no pictures' side: image tower, preprocessing and logit scale are those of IMAGE, a model by
any name that a recipe takes.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from compress import atomic, clip, plugin
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.sources import _bert, _checkpoint, _hf_towers, _hub, _licenses, _text_files
from compress.sources._fit import fitting
from compress.sources.huggingface import CONFIG, WEIGHTS, read_json, weights_file
from compress.structure import ClipConfig, TextConfig, require_float

MODULES, SETTINGS = "modules.json", "sentence_bert_config.json"
LINEAR = "LinearTransformation."
EXAMPLE = "mclip:FOLDER+open_clip:ViT-B-32/openai"


@dataclass(frozen=True)
class Texts:
    """A text tower as its folder holds it."""

    folder: Path
    """Where the encoder's weights and its tokenizer lie."""
    encoder: dict[str, Any]
    """Config of the encoder, with its defaults filled in."""
    weights: dict[str, Tensor]
    """The encoder's, under its own names."""
    projection: dict[str, Tensor]
    """`weight` [E, D], and perhaps `bias` [E]."""
    pooling: str
    """mean or first."""
    length: int
    """The longest text that the folder's settings allow, marks included."""


def load(name: str) -> Clip:
    """Open a text tower with an image tower (see the top of this file).

    Raises PocketclipError for a name without its second part, missing files, other kinds of layers,
    and towers that don't embed into one width.
    """
    place, plus, image = name.partition("+")
    if not plus or not image:
        raise PocketclipError(
            f"mclip:{name}: a text tower alone; name the image model that it was trained towards "
            f"as well: {EXAMPLE}"
        )
    beside = plugin.source(image, Path.cwd())
    require_float(beside.model.config, "mclip")
    folder = Path(place) if Path(place).is_dir() else _fetched(place)
    texts = _sentence_transformer(folder) if (folder / MODULES).is_file() else _m_clip(folder)
    short = folder.resolve().name if Path(place).is_dir() else place
    license = f"texts: {_licenses.of_card(folder)}; images: {beside.license}"
    step = {"step": "mclip", "name": short, "sha256": atomic.sha256(weights_file(texts.folder))}
    step |= _hub.revision(folder)
    config = _structure(beside.model.config, texts, folder)
    file = _text_files.tokenizer_file(texts.folder)
    return fitting(
        replace(
            beside,
            model=clip.build(config, _state(beside, texts, config), folder),
            tokenizer=_text_files.from_folder(texts.folder, file, config.text.context_length),
            name=f"{short}+{beside.name}",
            license=license,
            provenance=(*beside.provenance, {**step, **_licenses.flags(license)}),
            classes=None,
        )
    )


def is_folder(folder: Path) -> bool:
    """Whether a folder holds such a text tower."""
    if (folder / MODULES).is_file():
        return True
    return (folder / CONFIG).is_file() and "modelBase" in read_json(folder / CONFIG)


def _fetched(repository: str) -> Path:
    """The folder of a repository in either layout, from the hub or its cache."""
    encoder = [(CONFIG,), *((file,) for file in _text_files.FILES), WEIGHTS]
    listed = _hub.optional(repository, MODULES)
    if listed is None:
        return _hub.fetched(repository, encoder, "mclip")
    parts = {kind: PurePosixPath(path) for kind, path in _modules(listed.parent).items()}
    files = [tuple(str(parts["Transformer"] / name) for name in names) for names in encoder]
    files += [(str(parts["Pooling"] / CONFIG),), (str(parts["Dense"] / CONFIG),)]
    files += [tuple(str(parts["Dense"] / name) for name in WEIGHTS)]
    _hub.optional(repository, str(parts["Transformer"] / SETTINGS))
    return _hub.fetched(repository, files, "mclip")


def _m_clip(folder: Path) -> Texts:
    """M-CLIP's own layout; its config names the encoder, and may state its shape."""
    config = read_json(folder / CONFIG)
    base = str(config.get("modelBase"))
    known = {**_bert.NAMED, "LABSE": _bert.NAMED["sentence-transformers/LaBSE"]}
    if base not in known:
        raise PocketclipError(
            f"{folder / CONFIG}: the text encoder {base!r} (modelBase) is not supported; there are "
            f"{', '.join(known)}"
        )
    own = {key: value for key, value in config.items() if key != "model_type"}
    weights = _checkpoint.read(weights_file(folder))
    return Texts(
        folder=folder,
        encoder=_bert.described({**known[base], **own}, folder / CONFIG),
        weights={k.removeprefix("transformer."): v for k, v in weights.items() if LINEAR not in k},
        projection={k.removeprefix(LINEAR): v for k, v in weights.items() if LINEAR in k},
        pooling="mean",
        length=_hf_towers.BERT_TOKENS,
    )


def _sentence_transformer(folder: Path) -> Texts:
    """The layout of sentence-transformers: an encoder, a pooling, a dense layer."""
    parts = _modules(folder)
    dense = read_json(folder / parts["Dense"] / CONFIG)
    if not str(dense.get("activation_function")).endswith("Identity"):
        raise PocketclipError(
            f"{folder / parts['Dense'] / CONFIG}: not supported: a dense layer that ends in "
            f"{dense.get('activation_function')}"
        )
    pooling = read_json(folder / parts["Pooling"] / CONFIG)
    modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on}
    kinds = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    if len(modes) != 1 or not modes <= kinds.keys():
        raise PocketclipError(
            f"{folder / parts['Pooling'] / CONFIG}: not supported: {', '.join(sorted(modes))}"
        )
    root = folder / parts["Transformer"]
    settings = root / SETTINGS
    longest = read_json(settings).get("max_seq_length") if settings.is_file() else None
    matrix = _checkpoint.read(weights_file(folder / parts["Dense"]))
    return Texts(
        folder=root,
        encoder=_bert.described(read_json(root / CONFIG), root / CONFIG),
        weights=_checkpoint.read(weights_file(root)),
        projection={name.removeprefix("linear."): tensor for name, tensor in matrix.items()},
        pooling=kinds[modes.pop()],
        length=min(_hf_towers.BERT_TOKENS, longest or _hf_towers.BERT_TOKENS),
    )


def _modules(folder: Path) -> dict[str, str]:
    """Kind of each part in modules.json -> its folder."""
    wanted = {"Transformer", "Pooling", "Dense"}
    try:
        entries = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        found = {str(entry["type"]).rpartition(".")[2]: str(entry["path"]) for entry in entries}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PocketclipError(f"{folder / MODULES}: not a list of modules: {error}") from None
    if set(found) - {"Normalize"} != wanted:
        raise PocketclipError(
            f"{folder / MODULES}: holds {', '.join(found)}; a text tower beside a CLIP has "
            f"{', '.join(sorted(wanted))}"
        )
    return found


def _structure(beside: ClipConfig, texts: Texts, folder: Path) -> ClipConfig:
    matrix = texts.projection.get("weight")
    if matrix is None:
        raise PocketclipError(f"{folder}: its weights hold no projection of the texts")
    if len(matrix) != beside.embed_dim:
        raise PocketclipError(
            f"{folder}: texts become {len(matrix)} numbers, the image model's pictures "
            f"{beside.embed_dim}; name the image model that this text tower was trained towards"
        )
    limit = texts.encoder["max_position_embeddings"] - _bert.offset(texts.encoder)
    settings = _bert.config(texts.encoder, min(texts.length, limit), folder)
    extra = {"pooling": texts.pooling, "projection_bias": "bias" in texts.projection}
    text = TextConfig.model_validate({**settings, **extra})
    return beside.model_copy(update={"text": text})


def _state(beside: Clip, texts: Texts, config: ClipConfig) -> dict[str, Tensor]:
    """The weights of both towers under our names."""
    state = {k: v for k, v in beside.model.state_dict().items() if not k.startswith("text.")}
    state |= _bert.renamed(texts.weights, texts.encoder, config.text.context_length)
    return state | {f"text.projection.{kind}": v for kind, v in texts.projection.items()}
