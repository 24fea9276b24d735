"""Rows about one artifact, tower by tower: what it is, what it weighs, and how good it is."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from benchmarks.bundles import TOWERS, Bundle
from compress import inspect
from compress.clip import Clip, Encoder, TorchEncoder
from compress.embeddings import Contracts, Embeddings, embed, headline_split
from compress.evaluate import Config, measure
from compress.model import num_embedding_params
from compress.work import Data
from export import Unavailable


@dataclass
class Accuracy:
    """Measures artifacts one after the other, on the same questions; the teacher comes first."""

    data: Data
    cfg: Config
    teacher: dict[str, Embeddings] = field(default_factory=dict)
    headline_vectors: dict[str, Embeddings] = field(default_factory=dict)
    """By the artifact's path: its vectors on the headline split, for the examples."""

    @property
    def headline(self) -> str | None:
        """The leading split; None for a recipe without evaluation data."""
        return headline_split(self.data, self.cfg) if self.data.evaluate else None

    def of_torch(self, clip: Clip, artifact: str, path: str) -> list[dict[str, Any]]:
        """The torch model itself: what exported files are compared with."""
        accuracy = self._measure(TorchEncoder(clip), clip, artifact, path)
        about = {"artifact": artifact, "target": "torch", "precision": "fp32", "executed": True}
        return [
            {
                **about,
                "path": path,
                "tower": tower,
                "sha256": tower_digest(clip, tower),
                "size_bytes": 4 * num_params(clip, tower)["num_params"],
                "parity_worst_cosine": 1.0,
                **num_params(clip, tower),
                "accuracy": accuracy,
            }
            for tower in TOWERS
        ]

    def of_bundle(self, bundle: Bundle, clip: Clip, path: str) -> list[dict[str, Any]]:
        """Exported files, judged with the preprocessing and the tokenizer that they state.

        `clip` is the model they were made from.
        """
        accuracy: dict[str, Any] = {}
        reason = None
        try:
            accuracy = self._measure(bundle.encoder(), bundle, bundle.artifact, path)
        except Unavailable as unavailable:
            reason = str(unavailable)
        return [
            {
                "artifact": bundle.artifact,
                "target": bundle.target,
                "precision": bundle.precision,
                "executed": reason is None,
                "path": path,
                "tower": tower,
                "sha256": bundle.sha256(tower),
                "size_bytes": bundle.size_bytes(tower),
                "parity_worst_cosine": bundle.parity(tower),
                "unavailable": reason,
                **num_params(clip, tower),
                "accuracy": accuracy,
            }
            for tower in TOWERS
        ]

    def on_headline(self, clip: Clip, path: str) -> dict[str, Any]:
        """The headline split alone, for models on the way that are not shipped."""
        vectors = self._embed(TorchEncoder(clip), clip, path, [self.headline or ""])
        return self._figures(vectors)[self.headline or ""]

    def _measure(
        self, encoder: Encoder, contracts: Contracts, artifact: str, path: str
    ) -> dict[str, dict[str, Any]]:
        if self.headline is None:
            return {}
        vectors = self._embed(encoder, contracts, path, None)
        if not self.teacher:
            assert artifact == "teacher", f"{artifact} was measured before the teacher"
            self.teacher = vectors
        self.headline_vectors[path] = vectors[self.headline]
        return self._figures(vectors)

    def _embed(
        self, encoder: Encoder, contracts: Contracts, path: str, splits: list[str] | None
    ) -> dict[str, Embeddings]:
        return embed(encoder, contracts, self.data, self.cfg, splits, f"accuracy of {path}")

    def _figures(self, vectors: dict[str, Embeddings]) -> dict[str, dict[str, Any]]:
        return {
            name: measure(own, self.cfg, self.teacher.get(name)) for name, own in vectors.items()
        }


def num_params(clip: Clip, tower: str) -> dict[str, int]:
    """Weights of a tower, how many of them are the token table, and multiply-adds of a query."""
    module = getattr(clip.model, tower)
    return {
        "num_params": sum(parameter.numel() for parameter in module.parameters()),
        "num_embedding_params": num_embedding_params(clip.model) if tower == "text" else 0,
        "num_macs": inspect.num_macs(clip.model.config)[tower],
    }


def tower_digest(clip: Clip, tower: str) -> str:
    """sha256 over the names and values of a tower's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(getattr(clip.model, tower).state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
