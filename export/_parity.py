"""Does an artifact say what the torch model says? One gate per tower, before anything is shipped.

Shapes: Q queries, C candidates, E embedding.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from compress.clip import Clip, Encoder
from compress.errors import GateFailed
from export import _goldens, _zero_shot
from export._reference import Reference

NUM_PICTURES = 48
FEW_PICTURES, FEW_CAPTIONS = 8, 16
"""Drawings and captions for a runtime that is too slow for all of them."""
FLAT = ("black", "gray", "white")
NEAREST = 10
NUM_REPEATED, FEW_REPEATED = 8, 2
"""Rows that are run a second time, in another order and alone."""

Diagnose = Callable[[str, Tensor], str]


class Agreement(TypedDict):
    """How far one tower's embeddings stand from the torch model's."""

    worst_cosine: float
    p1_cosine: float
    overlap_at_10: float
    num_rows: NotRequired[int]
    """Pictures or texts that were compared."""
    reordered_cosine: NotRequired[float]
    """Rows in reverse order against themselves: 1 where no row sees its neighbours."""
    alone_cosine: NotRequired[float]
    """A row in a call of its own against the same row among others."""
    padded_cosine: NotRequired[float]
    full_cosine: NotRequired[float]
    """Text: the worst cosine of texts with padding, and of those that fill the context."""


def check(
    clip: Clip,
    artifact: Encoder,
    min_cosine: float,
    name: str,
    diagnose: Diagnose | None = None,
    few: bool = False,
) -> dict[str, Any]:
    """Compare both towers on generated pictures and captions -> figures per tower.

    With data in `clip`, `zero_shot` stands beside them. `few` leaves that out, and most drawings
    and captions: for a slow runtime of files that a fast one is judged on as well. Raises
    GateFailed, with the figures, where an output isn't finite or of unit length, depends on other
    rows, or the worst cosine is below `min_cosine`; `diagnose(tower, row)` then says where in the
    graph it comes from.
    """
    rows = dict(zip(("image", "text"), probes(clip, few)))
    torch_model = Reference(clip)
    wanted = {tower: _encode(torch_model, tower, rows[tower]) for tower in rows}
    found = {tower: _encode(artifact, tower, rows[tower]) for tower in rows}
    figures: dict[str, Any] = {}
    for tower, other in (("image", "text"), ("text", "image")):
        place = f"{name}, {tower} tower"
        _sound(found[tower], place)
        overlap = rank_overlap(wanted[tower], found[tower], wanted[other])
        figures[tower] = agreement(wanted[tower], found[tower], overlap)
        figures[tower]["num_rows"] = len(found[tower])
        cosine = F.cosine_similarity(wanted[tower].double(), found[tower].double(), dim=-1)
        if tower == "text":
            figures[tower] |= _by_length(cosine, rows["text"])
        repeated = FEW_REPEATED if few else NUM_REPEATED
        figures[tower] |= _repeated(artifact, tower, rows[tower][:repeated], found[tower])
        worst = int(cosine.argmin())
        where = lambda t=tower, n=worst: diagnose(t, rows[t][n : n + 1]) if diagnose else ""  # noqa: E731
        _gate(figures[tower], min_cosine, f"{place}, {_probe(tower, worst, few)}", where)
    return figures if few else figures | _zero_shot.compare(clip, torch_model, artifact)


def probes(clip: Clip, few: bool = False) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] and token ids [B, L]: goldens, drawings, captions, flat pictures.

    All pixels are those of 8-bit pictures: some targets take nothing else (Core ML's ImageType).
    """
    height, width = clip.preprocess.size
    pictures = list(_goldens.pictures((height, width)).values())
    drawn = range(FEW_PICTURES if few else NUM_PICTURES)
    pictures += [_goldens.drawing(100 + i, (width * 2, height + i)) for i in drawn]
    pictures += [Image.new("RGB", (width, height), color) for color in FLAT]
    pixels = torch.stack([clip.preprocess(picture) for picture in pictures])
    captions = _goldens.captions()[: FEW_CAPTIONS if few else None]
    return pixels, clip.tokenizer([*_goldens.TEXTS, *captions])


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


def _encode(encoder: Encoder, tower: str, rows: Tensor) -> Tensor:
    return encoder.encode_image(rows) if tower == "image" else encoder.encode_text(rows)


def _repeated(artifact: Encoder, tower: str, rows: Tensor, found: Tensor) -> dict[str, float]:
    """The same rows in another order, and one without the others."""
    found = found[: len(rows)].double()
    turned = _encode(artifact, tower, rows.flip(0)).flip(0).double()
    alone = _encode(artifact, tower, rows[-1:]).double()
    return {
        "reordered_cosine": F.cosine_similarity(turned, found, dim=-1).min().item(),
        "alone_cosine": F.cosine_similarity(alone, found[-1:], dim=-1).item(),
    }


def _by_length(cosine: Tensor, tokens: Tensor) -> dict[str, float]:
    """The worst cosine of texts with padding and of texts without; one golden is over-long."""
    empty = tokens[_goldens.TEXTS.index("")]
    full = tokens[:, -2] != empty[-2]
    assert full.any() and not full.all(), "goldens hold an empty and an over-long text"
    return {
        "padded_cosine": cosine[~full].min().item(),
        "full_cosine": cosine[full].min().item(),
    }


def _probe(tower: str, index: int, few: bool) -> str:
    """What a probe is, for a message."""
    if tower == "text":
        return f"text {[*_goldens.TEXTS, *_goldens.captions()][index][:30]!r}"
    goldens = list(_goldens.pictures((32, 32)))
    drawings = [f"drawing {n}" for n in range(FEW_PICTURES if few else NUM_PICTURES)]
    return f"picture {[*goldens, *drawings, *(f'all {color}' for color in FLAT)][index]}"


def _sound(embeddings: Tensor, place: str) -> None:
    if not torch.isfinite(embeddings).all():
        bad = int((~torch.isfinite(embeddings).all(dim=-1)).sum())
        raise GateFailed(f"{place}: {bad} of {len(embeddings)} outputs hold NaN or infinity")
    length = embeddings.norm(dim=-1)
    if (length - 1).abs().max() > 1e-3:
        raise GateFailed(f"{place}: outputs have length {length.min():.4f} to {length.max():.4f}")


def _gate(
    figures: Mapping[str, float], min_cosine: float, place: str, where: Callable[[], str]
) -> None:
    worst = figures["worst_cosine"]
    if math.isnan(worst) or worst < min_cosine:
        raise GateFailed(
            f"{place}: worst cosine to the torch model {worst:.5f} (1st percentile "
            f"{figures['p1_cosine']:.5f}, rank overlap@10 {figures['overlap_at_10']:.3f}) is below "
            f"min_cosine {min_cosine}; choose a higher precision, or lower min_cosine knowingly"
            f"{where()}"
        )
    for key in ("reordered_cosine", "alone_cosine"):
        if not figures.get(key, 1.0) >= min_cosine:
            raise GateFailed(
                f"{place}: embeddings depend on the other rows of a call ({key} "
                f"{figures.get(key):.5f}, below {min_cosine}); export with batch 1"
            )
