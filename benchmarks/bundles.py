"""An export folder as something to evaluate and to time."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import plugin
from compress.clip import Encoder
from compress.preprocess import Preprocess
from compress.tokenizer import Tokenizer, TokenizerContract
from export import _bundle, _verify

TOWERS = ("image", "text")
PEERS = "benchmarks.peers"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its own preprocessing and tokenizer are what it is judged with."""

    folder: Path
    artifact: str
    """teacher or student; for a bundle from elsewhere, its model's name."""
    about: dict[str, Any]
    """bundle.json."""

    @property
    def target(self) -> str:
        return str(self.about["target"])

    @property
    def precision(self) -> str:
        return str(self.about["precision"])

    @cached_property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_bundle(self.about["preprocess"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        entry = dict(self.about["tokenizer"])
        file = self.folder / entry.pop("file")
        fields = {key: entry[key] for key in TokenizerContract.model_fields if key in entry}
        return Tokenizer.load(file, TokenizerContract.model_validate(fields))

    def encoder(self, threads: int | None = None) -> Encoder:
        """Both towers, opened by the exporter that wrote them. Raises Unavailable."""
        loaded: Encoder = opener(self.target).load(self.folder, threads=threads)
        return loaded

    def files(self, tower: str) -> list[Path]:
        """What one tower consists of: `image.onnx`, and `image.onnx.data` where there is one."""
        names = sorted(self.about["files"])
        stem = str(self.about[tower]["file"]).split(".")[0]
        return [self.folder / name for name in names if name.split(".")[0] == stem]

    def sha256(self, tower: str) -> str:
        """The hash that bundle.json gives for the file, or package, that the runtime opens."""
        files, name = self.about["files"], self.about[tower]["file"]
        return str(_bundle.digest(files, name)).removeprefix("sha256:")

    def size_bytes(self, tower: str) -> int:
        return sum(path.stat().st_size for path in self.files(tower))

    def queries(self, tower: str) -> NDArray[Any]:
        """The inputs of its goldens: pixels [Q, 3, H, W] float32, or ids [Q, L] int32."""
        golden = self.folder / "golden"
        about = json.loads((golden / "golden.json").read_text(encoding="utf-8"))
        if tower == "text":
            return np.array([entry["ids"] for entry in about["texts"]], dtype=np.int32)
        files = [golden / entry["pixels"] for entry in about["images"]]
        return np.stack([np.load(file, allow_pickle=False) for file in files])

    def parity(self, tower: str) -> float | None:
        """Worst cosine to the torch model when it was written."""
        figures = self.about.get("parity", {}).get(tower)
        return None if figures is None else float(figures["worst_cosine"])


def opener(target: str) -> ModuleType:
    """Whose `load` opens a target's bundles: the exporter's, or a peer's with its own runtime."""
    peer = target in plugin.names(PEERS) and target not in plugin.names(plugin.EXPORTERS)
    return plugin.find(PEERS if peer else plugin.EXPORTERS, target)


def read(folder: Path, artifact: str | None = None) -> Bundle:
    """Open a bundle after checking the hash of every file.

    Raises PocketclipError for a folder that is no bundle, or files that changed.
    """
    about = _verify.read(folder)
    _verify.check_files(folder, about["files"])
    return Bundle(folder, artifact or about["model"]["name"], about)
