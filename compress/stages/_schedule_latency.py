"""What a schedule costs in a runtime, forecast from a few measurements.

The tower is exported with all its tokens, with fewer from the first block on, and with fewer by the
method itself, and timed in turns: so both a block's saving and a site's own cost are measured.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compress import atomic, plugin
from compress.clip import Clip
from compress.schedule import Site
from compress.structure import VisionConfig, plain_vision

if TYPE_CHECKING:
    from compress.stages.prune_tokens import Config, Search

SHARES = (1.0, 0.75, 0.5, 0.25)
OF_SITE = 0.5
"""Share of the tokens that is kept where a site's own cost is measured."""
ROUNDS = 15


@dataclass(frozen=True)
class Latency:
    """Shares of the full tower's latency."""

    shares: list[float]
    """Shares of the tokens in a block, rising."""
    saved: list[float]
    """What one block with that share of the tokens saves."""
    site: float
    """What one site of the method costs, over that of places fixed in advance."""


def share(vision: VisionConfig, keeps: dict[int, int], latency: Latency) -> float:
    """Forecast latency with these sites (layer -> tokens kept) over that of the full tower."""
    patches = vision.grid**2
    tokens, left = patches, 1.0 + latency.site * len(keeps)
    for layer in range(vision.num_layers):
        before, tokens = tokens, keeps.get(layer, tokens)
        # Attention and its projections are about a third of a block, the MLP two thirds.
        for weight, now in ((1 / 3, before), (2 / 3, tokens)):
            left -= weight * float(np.interp(now / patches, latency.shares, latency.saved))
    return left


def measured(clip: Clip, cfg: "Config", wanted: "Search", out: Path) -> Latency:
    """Measured in the target's runtime, one thread; kept in out/latency.json.

    Raises export.Unavailable where the target's runtime cannot run here.
    """
    path = out / "latency.json"
    if path.exists():
        return Latency(**json.loads(path.read_text())["latency"])
    exporter = plugin.find(plugin.EXPORTERS, wanted.target)
    precision = {"precision": wanted.precision} if wanted.precision else {}
    plain = cfg.model_copy(update={"method": "grid", "proportional": None})
    variants = {f"{n:.2f}": _with_share(clip, plain, n) for n in SHARES}
    variants["site"] = _with_share(clip, cfg, OF_SITE)
    encoders = []
    for name, variant in variants.items():
        folder = out / "search" / name
        if not (folder / "bundle.json").exists():
            exporter.write(variant, exporter.Config(**precision), folder)
        encoders.append(exporter.load(folder, threads=1))
    vision = plain_vision(clip.model.config, "prune_tokens")
    size = vision.image_size
    calls = [encoder.encode_image for encoder in encoders]
    milliseconds = interleaved(calls, torch.zeros(1, 3, size, size))
    found = of_milliseconds(milliseconds, vision)
    atomic.write_json(path, {"milliseconds": milliseconds, "latency": vars(found)})
    return found


def of_milliseconds(milliseconds: list[float], vision: VisionConfig) -> Latency:
    """milliseconds: at each of SHARES by fixed places, then at OF_SITE by the method."""
    *by_share, with_site = milliseconds
    whole = by_share[0]
    # The first block's attention still sees all tokens.
    saved = [max(0.0, (1 - ms / whole) / (vision.num_layers - 1 / 3)) for ms in by_share]
    site = max(0.0, (with_site - by_share[SHARES.index(OF_SITE)]) / whole)
    shares = [_kept(vision, wanted) / vision.grid**2 for wanted in SHARES]
    return Latency(shares[::-1], saved[::-1], site)


def _kept(vision: VisionConfig, wanted: float) -> int:
    """Whole rows of patches, which every method can keep."""
    return vision.grid * math.ceil(vision.grid * wanted)


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


def _with_share(clip: Clip, cfg: "Config", kept: float) -> Clip:
    """The tower with this share of its tokens from the first block on."""
    from compress.stages.prune_tokens import reduced, with_sites

    vision = plain_vision(clip.model.config, "prune_tokens")
    if kept == 1:
        return reduced(clip, None)
    return reduced(clip, with_sites(cfg, [Site(layer=0, keep=_kept(vision, kept))]))
