"""Opens what a user points at, an exported bundle or a model, as something that can be measured."""

from dataclasses import dataclass
from pathlib import Path

from compress import plugin
from compress.clip import Encoder, TorchEncoder
from compress.fold import fold
from compress.preprocess import Preprocess
from compress.tokenizer import Tokenizer, TokenizerContract


@dataclass(frozen=True)
class Artifact:
    """An encoder with the contracts that its inputs follow."""

    name: str
    encoder: Encoder
    preprocess: Preprocess
    tokenizer: Tokenizer


def open_artifact(model: str) -> Artifact:
    """A folder with bundle.json runs in its own runtime; anything else is opened as a source.

    Raises PocketclipError for a bundle whose files changed, export.Unavailable where its runtime
    cannot run here.
    """
    folder = Path(model)
    if (folder / "bundle.json").exists():
        return _open_bundle(folder)
    clip = fold(plugin.source(model, Path.cwd()))
    return Artifact(clip.name, TorchEncoder(clip), clip.preprocess, clip.tokenizer)


def _open_bundle(folder: Path) -> Artifact:
    from export import _verify

    bundle = _verify.read(folder)
    _verify.check_files(folder, bundle["files"])
    contract = {key: value for key, value in bundle["tokenizer"].items() if key != "file"}
    tokenizer = Tokenizer.load(
        folder / bundle["tokenizer"]["file"], TokenizerContract.model_validate(contract)
    )
    encoder = plugin.find(plugin.EXPORTERS, bundle["target"]).load(folder)
    preprocess = Preprocess.from_bundle(bundle["preprocess"])
    return Artifact(bundle["model"]["name"], encoder, preprocess, tokenizer)
