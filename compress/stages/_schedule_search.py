"""Chooses sites and K from measured latency: greedy, one vector of tokens at a time.

The cost of a block is measured, not assumed: the tower is exported with all its tokens and with
fewer from the first block on, and timed in turns. The price of a step is how far the embeddings of
a few training images move. Each step takes the site that saves most time for its price.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress import atomic, plugin
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.schedule import Reduction, Site
from compress.structure import VisionConfig, plain_vision
from compress.work import Work

if TYPE_CHECKING:
    from compress.stages.prune_tokens import Config, Search

SHARES = (1.0, 0.75, 0.5, 0.25)
ROUNDS = 15
PRICE_FLOOR = 1e-5  # of a cosine: below it a step is free


def search(work: Work, cfg: "Config", wanted: "Search", out: Path) -> Reduction:
    """The cheapest schedule found for the share of the latency; its steps go to out/search.json."""
    from compress.stages.prune_tokens import MULTIPLE, reduced, with_sites

    vision = plain_vision(work.clip.model.config, "prune_tokens")
    saved = saved_per_block(work.clip, wanted, out)
    pixels = calibration_pixels(work, wanted.num_images)
    full = embed(work.clip, pixels)
    keeps: dict[int, int] = {}
    trace = []
    while (left := latency_share(vision, keeps, saved)) > wanted.latency:
        best: tuple[float, dict[int, int], float] | None = None
        for moved in _moves(vision, keeps, wanted.max_sites, MULTIPLE):
            reduction = with_sites(cfg, as_sites(moved))
            moved_by = 1 - float(
                (embed(reduced(work.clip, reduction), pixels) * full).sum(1).mean()
            )
            value = (left - latency_share(vision, moved, saved)) / max(moved_by, PRICE_FLOOR)
            if best is None or value > best[0]:
                best = (value, moved, moved_by)
        if best is None:
            raise PocketclipError(
                f"prune_tokens.search.latency: {wanted.max_sites} sites reach {left:.2f} of the "
                f"latency at most, not {wanted.latency}"
            )
        keeps = best[1]
        share = latency_share(vision, keeps, saved)
        trace.append({"keeps": keeps, "latency": share, "mean_cosine": 1 - best[2]})
    atomic.write_json(out / "search.json", {"saved_per_block": saved, "steps": trace})
    return with_sites(cfg, as_sites(keeps))


def as_sites(keeps: dict[int, int]) -> list[Site]:
    """Layer -> tokens kept, as sites in order."""
    return [Site(layer=layer, keep=keep) for layer, keep in sorted(keeps.items())]


def latency_share(vision: VisionConfig, keeps: dict[int, int], saved: dict[float, float]) -> float:
    """Forecast latency with these sites over that of the full tower."""
    patches = vision.grid**2
    tokens, left = patches, 1.0
    shares = sorted(saved)
    for layer in range(vision.num_layers):
        before, tokens = tokens, keeps.get(layer, tokens)
        # Attention and its projections are about a third of a block, the MLP two thirds.
        for weight, now in ((1 / 3, before), (2 / 3, tokens)):
            left -= weight * float(np.interp(now / patches, shares, [saved[s] for s in shares]))
    return left


def saved_per_block(clip: Clip, wanted: "Search", out: Path) -> dict[float, float]:
    """Share of the tower's latency that one block saves, for each share of the tokens in it.

    Raises export.Unavailable where the target's runtime cannot run here.
    """
    path = out / "latency.json"
    if path.exists():
        return {float(k): v for k, v in json.loads(path.read_text())["saved"].items()}
    exporter = plugin.find(plugin.EXPORTERS, wanted.target)
    precision = {"precision": wanted.precision} if wanted.precision else {}
    encoders = []
    for share in SHARES:
        folder = out / "search" / f"{share:.2f}"
        if not (folder / "bundle.json").exists():
            exporter.write(_with_share(clip, share), exporter.Config(**precision), folder)
        encoders.append(exporter.load(folder, threads=1))
    size = plain_vision(clip.model.config, "prune_tokens").image_size
    calls = [encoder.encode_image for encoder in encoders]
    milliseconds = interleaved(calls, torch.zeros(1, 3, size, size))
    layers = plain_vision(clip.model.config, "prune_tokens").num_layers
    whole = milliseconds[0]
    # The first block's attention still sees all tokens.
    found = {s: (1 - m / whole) / (layers - 1 / 3) for s, m in zip(SHARES, milliseconds)}
    saved = {s: max(0.0, value) for s, value in found.items()}
    atomic.write_json(path, {"milliseconds": milliseconds, "saved": saved})
    return saved


def interleaved(calls: list[Callable[[Tensor], Tensor]], example: Tensor) -> list[float]:
    """Median milliseconds of each call, all timed in turns."""
    samples = []
    for _ in range(ROUNDS):
        row = []
        for call in calls:
            call(example)
            start = time.perf_counter()
            call(example)
            row.append((time.perf_counter() - start) * 1e3)
        samples.append(row)
    return [float(value) for value in np.median(samples, axis=0)]


def calibration_pixels(work: Work, num: int) -> Tensor:
    """Evenly spread training images as pixels [num, 3, H, W]."""
    pairs = work.data.pairs
    places = torch.linspace(0, len(pairs) - 1, min(num, len(pairs))).long().tolist()
    return torch.stack([work.clip.preprocess(pairs.image(place)) for place in places])


@torch.no_grad()
def embed(clip: Clip, pixels: Tensor) -> Tensor:
    """Unit embeddings [B, E]."""
    return F.normalize(clip.model.encode_image(pixels), dim=-1)


def _with_share(clip: Clip, share: float) -> Clip:
    """The tower with this share of its tokens from the first block on."""
    from compress.stages.prune_tokens import reduced

    vision = plain_vision(clip.model.config, "prune_tokens")
    if share == 1:
        return reduced(clip, None)
    site = Site(layer=0, keep=max(1, round(vision.grid**2 * share)))
    return reduced(clip, Reduction(method="grid", sites=(site,)))


def _moves(
    vision: VisionConfig, keeps: dict[int, int], max_sites: int, step: int
) -> list[dict[int, int]]:
    """Every schedule one step cheaper: a site that keeps less, or one more site."""
    found = []
    open_layers = keeps if len(keeps) == max_sites else range(vision.num_layers - 1)
    for layer in open_layers:
        before = [keep for place, keep in keeps.items() if place <= layer]
        now = min(before, default=vision.grid**2)
        fewer = (now - 1) // step * step
        if fewer < step:
            continue
        moved = {**keeps, layer: fewer}
        # A later site that no longer drops anything is none.
        later = {place: keep for place, keep in moved.items() if place <= layer or keep < fewer}
        found.append(later)
    return found
