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

    Starts as k-means++ does (Arthur and Vassilvitskii, 2007); an empty cluster starts again from
    the vector that fits worst.
    """
    num_clusters = min(num_clusters, len(vectors))
    centres = _spread(vectors, num_clusters, generator)
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


def _spread(vectors: Tensor, num: int, generator: Generator) -> Tensor:
    """`num` of the vectors, each drawn in proportion to its squared distance from those before."""
    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    distance = torch.full((len(vectors),), float("inf"))
    while len(chosen) < num:
        distance = torch.minimum(distance, (2 - 2 * vectors @ vectors[chosen[-1]]).clamp(min=0))
        weights = distance + torch.finfo(distance.dtype).tiny  # equal vectors may be drawn as well
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return vectors[chosen].clone()


def _nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    found = [(block @ centres.T).max(dim=1) for block in vectors.split(BLOCK)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])
