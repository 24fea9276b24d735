"""What the torch model says of the rows that artifacts are compared on.

The exports of one run compare the same rows with the same model: each is computed once.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress import atomic
from compress.clip import Clip, TorchEncoder

ROWS = 8
"""Rows that the torch model is given at once: activations of many outweigh its weights."""

_known: dict[str, np.ndarray] = {}
"""Embeddings of this process, by the hash of model, tower and row."""


class Reference:
    """A clip as an encoder that computes no row twice in this process.

    A model with other weights or other layers is another one, also where it is the same object.
    """

    def __init__(self, clip: Clip) -> None:
        self._model = TorchEncoder(clip)
        self._name = f"{embedding_space(clip)} {clip.model!r}".encode()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, E]."""
        return self._encode("image", self._model.encode_image, pixels)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E]."""
        return self._encode("text", self._model.encode_text, tokens)

    def _encode(self, tower: str, encode: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        model = hashlib.sha256(f"{tower} {rows.dtype} {tuple(rows.shape[1:])}".encode())
        model.update(self._name)
        keys = []
        for row in rows:
            key = model.copy()
            key.update(row.numpy(force=True).tobytes())
            keys.append(key.hexdigest())
        missing = {key: i for i, key in enumerate(keys) if key not in _known}
        for part in torch.tensor(list(missing.values()), dtype=torch.long).split(ROWS):
            if len(part):
                found = encode(rows[part]).numpy(force=True)
                _known.update(zip((keys[i] for i in part.tolist()), found))
        return torch.from_numpy(np.stack([_known[key] for key in keys]))


def embedding_space(clip: Clip) -> str:
    """Fingerprint of the model that embeddings come from: sha256 over its structure and weights.

    Equal for all targets and precisions of one model, whose embeddings may share an index;
    different as soon as a weight differs.
    """
    digest = hashlib.sha256(clip.model.config.model_dump_json().encode())
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def save(path: Path) -> None:
    """Write what this process knows to an .npz file, for another process."""
    with atomic.file(path) as handle:
        np.savez(handle, **_known)  # type: ignore[arg-type]


def load(path: Path) -> None:
    """Read what another process left at `path`, if it did."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            _known.update(kept)
