"""Embeddings in fewer bytes: integer codes, signs, and fewer dimensions.

Shapes: N vectors of unit length, E embedding, K kept dimensions. An index holds codes; queries stay
float ("asymmetric" search), so that only the index loses.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["float32", "float16", "int8", "int4", "binary"]
BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4, "binary": 1}


@dataclass(frozen=True)
class Codec:
    """How an index stores vectors; `mean` and `reach` [E] come from training vectors."""

    kind: Kind
    mean: Tensor
    reach: Tensor

    def stored(self, vectors: Tensor) -> Tensor:
        """What search sees of vectors [N, E]: the values that their codes stand for."""
        if self.kind == "float32":
            return vectors
        if self.kind == "float16":
            return vectors.half().float()
        if self.kind == "binary":
            return (vectors > self.mean).float() * 2 - 1
        last = 2 ** (BITS[self.kind] - 1) - 1
        step = self.reach / last
        return (vectors / step).round().clamp(-last, last) * step

    def query(self, vectors: Tensor) -> Tensor:
        """Queries [N, E] made ready for `stored`; signs are of the distance to the mean."""
        return vectors - self.mean if self.kind == "binary" else vectors

    def num_bytes(self) -> int:
        """Bytes of one stored vector."""
        return math.ceil(len(self.mean) * BITS[self.kind] / 8)


def fit(kind: Kind, vectors: Tensor, quantile: float = 1.0) -> Codec:
    """A codec from training vectors [N, E]: each dimension's mean, and the reach of so many."""
    reach = torch.quantile(vectors.abs(), quantile, dim=0)
    return Codec(kind, vectors.mean(0), reach.clamp(min=1e-6))


def pca(images: Tensor, texts: Tensor, dim: int) -> Tensor:
    """Directions [E, K] that keep most of both modalities' vectors, each counted alike.

    Not centred: cosines stay cosines, and the projection folds into the towers' last layers.
    """
    assert images.shape[1] >= dim, (images.shape, dim)
    gram = sum((x.T @ x).double() / len(x) for x in (images, texts))
    assert isinstance(gram, Tensor)
    _, directions = torch.linalg.eigh(gram)  # ascending
    return directions[:, -dim:].flip(1).to(images.dtype)


def truncate(vectors: Tensor, dim: int) -> Tensor:
    """The first dimensions, made unit again: [N, E] -> [N, K] (Matryoshka, arXiv 2205.13147)."""
    return F.normalize(vectors[:, :dim], dim=-1)
