"""K-means on unit vectors (spherical), for data sets that fit in memory.

Shapes: N vectors, K clusters, E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

BLOCK = 8192


def spherical_kmeans(
    vectors: Tensor, num_clusters: int, generator: Generator, rounds: int = 20
) -> tuple[Tensor, Tensor]:
    """Cluster of each vector [N], and unit centres [K, E]. vectors [N, E] of unit length.

    Starts from K random vectors; an empty cluster starts again from the vector that fits worst.
    """
    num_clusters = min(num_clusters, len(vectors))
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:num_clusters]].clone()
    assigned = torch.full((len(vectors),), -1)
    for _ in range(rounds):
        nearest, similarity = _nearest(vectors, centres)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        sums = torch.zeros_like(centres).index_add_(0, assigned, vectors)
        empty = (torch.bincount(assigned, minlength=num_clusters) == 0).nonzero()[:, 0]
        worst = similarity.argsort()[: len(empty)]
        sums[empty] = vectors[worst]
        centres = F.normalize(sums, dim=-1)
    return _nearest(vectors, centres)[0], centres


def _nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    found = [(block @ centres.T).max(dim=1) for block in vectors.split(BLOCK)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])
