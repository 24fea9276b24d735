"""Does an artifact say what the torch model says? One gate per tower, before anything is shipped.

Shapes: Q queries, C candidates, E embedding.
"""

import math
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.clip import Clip, Encoder, TorchEncoder
from compress.errors import GateFailed
from export import _goldens

NUM_PICTURES = 48
NEAREST = 10


class Agreement(TypedDict):
    """How far one tower's embeddings stand from the torch model's."""

    worst_cosine: float
    p1_cosine: float
    overlap_at_10: float


def check(clip: Clip, artifact: Encoder, min_cosine: float, name: str) -> dict[str, Agreement]:
    """Compare both towers on generated pictures and captions -> figures per tower.

    Raises GateFailed, with the figures, where an output isn't finite, isn't of unit length, or the
    worst cosine is below `min_cosine`.
    """
    pixels, tokens = probes(clip)
    torch_model = TorchEncoder(clip)
    wanted = {"image": torch_model.encode_image(pixels), "text": torch_model.encode_text(tokens)}
    found = {"image": artifact.encode_image(pixels), "text": artifact.encode_text(tokens)}
    figures = {}
    for tower, other in (("image", "text"), ("text", "image")):
        _sound(found[tower], f"{name}, {tower} tower")
        overlap = rank_overlap(wanted[tower], found[tower], wanted[other])
        figures[tower] = agreement(wanted[tower], found[tower], overlap)
        _gate(figures[tower], min_cosine, f"{name}, {tower} tower")
    return figures


def probes(clip: Clip) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] and token ids [B, L]: goldens, drawings, captions, flat pictures."""
    height, width = clip.preprocess.size
    pictures = list(_goldens.pictures((height, width)).values())
    pictures += [_goldens.drawing(100 + i, (width * 2, height + i)) for i in range(NUM_PICTURES)]
    flat = [torch.full((3, height, width), value) for value in (-3.0, 0.0, 3.0)]
    pixels = torch.stack([*(clip.preprocess(picture) for picture in pictures), *flat])
    return pixels, clip.tokenizer([*_goldens.TEXTS, *_goldens.captions()])


def agreement(wanted: Tensor, found: Tensor, overlap: float) -> Agreement:
    """[Q, E] twice -> the worst and the first-percentile cosine, with `overlap` beside them."""
    cosine = F.cosine_similarity(wanted.double(), found.double(), dim=-1)
    return {
        "worst_cosine": cosine.min().item(),
        "p1_cosine": torch.quantile(cosine, 0.01).item(),
        "overlap_at_10": overlap,
    }


def rank_overlap(wanted: Tensor, found: Tensor, candidates: Tensor, k: int = NEAREST) -> float:
    """Share of the k nearest candidates [C, E] that two sets of queries [Q, E] have in common."""
    k = min(k, len(candidates))
    theirs, mine = ((queries @ candidates.T).topk(k).indices for queries in (wanted, found))
    common = (theirs.unsqueeze(2) == mine.unsqueeze(1)).any(dim=2)  # [Q, k]
    return common.float().mean().item()


def _sound(embeddings: Tensor, place: str) -> None:
    if not torch.isfinite(embeddings).all():
        bad = int((~torch.isfinite(embeddings).all(dim=-1)).sum())
        raise GateFailed(f"{place}: {bad} of {len(embeddings)} outputs hold NaN or infinity")
    length = embeddings.norm(dim=-1)
    if (length - 1).abs().max() > 1e-3:
        raise GateFailed(f"{place}: outputs have length {length.min():.4f} to {length.max():.4f}")


def _gate(figures: Agreement, min_cosine: float, place: str) -> None:
    worst = figures["worst_cosine"]
    if math.isnan(worst) or worst < min_cosine:
        raise GateFailed(
            f"{place}: worst cosine to the torch model {worst:.5f} (1st percentile "
            f"{figures['p1_cosine']:.5f}, rank overlap@10 {figures['overlap_at_10']:.3f}) is below "
            f"min_cosine {min_cosine}; choose a higher precision, or lower min_cosine knowingly"
        )
