"""Chooses sites and K: greedy, one vector of tokens at a time, by measured latency.

The price of a step is how far the embeddings of a few training images move. Each step takes the
site that saves most time for its price, until the latency is reached or too many images change
their nearest name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress import atomic
from compress.batches import embed_names
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.schedule import Reduction, Site
from compress.stages import _schedule_latency
from compress.stages._schedule_latency import Latency
from compress.structure import VisionConfig, plain_vision
from compress.work import Work

if TYPE_CHECKING:
    from compress.stages.prune_tokens import Config, Search

PRICE_FLOOR = 1e-5  # of a cosine: below it a step is free
Keeps = dict[int, int]
"""Layer -> tokens kept there."""


@dataclass(frozen=True)
class Step:
    """A schedule that the search has tried."""

    keeps: Keeps
    latency: float
    """Forecast share of the full tower's latency."""
    mean_cosine: float
    """Between reduced and full embeddings."""
    agreement: float | None
    """Share of the images whose nearest name stays; None where names aren't asked."""


class Trial:
    """Tries schedules on a few training images."""

    def __init__(self, work: Work, cfg: "Config", wanted: "Search", latency: Latency) -> None:
        self.clip, self.cfg, self.latency = work.clip, cfg, latency
        self.vision = plain_vision(work.clip.model.config, "prune_tokens")
        self.pixels = calibration_pixels(work, wanted.num_images)
        self.full = embed(work.clip, self.pixels)
        self.names: Tensor | None = None
        if wanted.agreement is not None:
            names = [name for _, name in work.data.classes]
            self.names = embed_names(work.clip, names, list(work.data.templates))  # [C, E]

    def at(self, keeps: Keeps) -> Step:
        from compress.stages.prune_tokens import reduced, with_sites

        found = embed(reduced(self.clip, with_sites(self.cfg, as_sites(keeps))), self.pixels)
        agreement = None
        if self.names is not None:
            nearest = [(x @ self.names.T).argmax(dim=1) for x in (found, self.full)]
            agreement = float((nearest[0] == nearest[1]).float().mean())
        share = _schedule_latency.share(self.vision, keeps, self.latency)
        return Step(keeps, share, float((found * self.full).sum(dim=1).mean()), agreement)


def search(work: Work, cfg: "Config", wanted: "Search", out: Path) -> Reduction:
    """The schedule found for the budget; its steps go to out/search.json."""
    from compress.stages.prune_tokens import with_sites

    latency = _schedule_latency.measured(work.clip, cfg, wanted, out)
    trial = Trial(work, cfg, wanted, latency)
    keeps: Keeps = {}
    trace: list[dict[str, Any]] = []
    left = 1.0
    while wanted.latency is None or left > wanted.latency:
        tried = [trial.at(moved) for moved in _moves(trial.vision, keeps, wanted.max_sites)]
        allowed = [s for s in tried if wanted.agreement is None or _agrees(s, wanted.agreement)]
        cheaper = [step for step in allowed if step.latency < left]
        if not cheaper:
            break
        best = max(cheaper, key=lambda step: _value(step, left))
        keeps, left = best.keeps, best.latency
        trace.append(vars(best))
    atomic.write_json(out / "search.json", {"latency": vars(latency), "steps": trace})
    if wanted.latency is not None and left > wanted.latency:
        raise PocketclipError(
            f"prune_tokens.search.latency: {wanted.max_sites} sites reach {left:.2f} of the "
            f"latency at most, not {wanted.latency}"
        )
    if not keeps:
        raise PocketclipError(
            f"prune_tokens.search.agreement: no schedule saves time and leaves {wanted.agreement} "
            "of the images their nearest name: lower it, or leave this stage out"
        )
    return with_sites(cfg, as_sites(keeps))


def _agrees(step: Step, wanted: float) -> bool:
    assert step.agreement is not None
    return step.agreement >= wanted


def _value(step: Step, before: float) -> float:
    """Time saved for how far embeddings are from the full ones."""
    return (before - step.latency) / max(1 - step.mean_cosine, PRICE_FLOOR)


def as_sites(keeps: Keeps) -> list[Site]:
    """Layer -> tokens kept, as sites in order."""
    return [Site(layer=layer, keep=keep) for layer, keep in sorted(keeps.items())]


def calibration_pixels(work: Work, num: int) -> Tensor:
    """Evenly spread training images as pixels [num, 3, H, W]."""
    pairs = work.data.pairs
    places = torch.linspace(0, len(pairs) - 1, min(num, len(pairs))).long().tolist()
    return torch.stack([work.clip.preprocess(pairs.image(place)) for place in places])


@torch.no_grad()
def embed(clip: Clip, pixels: Tensor) -> Tensor:
    """Unit embeddings [B, E]."""
    return F.normalize(clip.model.encode_image(pixels), dim=-1)


def _moves(vision: VisionConfig, keeps: Keeps, max_sites: int) -> list[Keeps]:
    """Every schedule one step cheaper: a site that keeps less, or one more site."""
    from compress.stages.prune_tokens import MULTIPLE

    found = []
    open_layers = keeps if len(keeps) == max_sites else range(vision.num_layers - 1)
    for layer in open_layers:
        before = [keep for place, keep in keeps.items() if place <= layer]
        now = min(before, default=vision.grid**2)
        fewer = (now - 1) // MULTIPLE * MULTIPLE
        if fewer < MULTIPLE:
            continue
        moved = {**keeps, layer: fewer}
        # A later site that no longer drops anything is none.
        later = {place: keep for place, keep in moved.items() if place <= layer or keep < fewer}
        found.append(later)
    return found
