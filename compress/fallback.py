"""From the best to the safest: quantize, export, judge, and step down until the gates hold.

Each rung is a setting of the quantize stage; it is exported with the runtime's own exporter, judged
on training pairs that calibration did not see, and timed against the same runtime's float files,
interleaved. What was tried, and why it was left, is the result as much as the model is.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress import plugin
from compress.batches import Sampler
from compress.clip import Clip, Encoder
from compress.scheme import Scheme
from compress.twin import with_scheme
from compress.work import Work

# Setting of the quantize stage that each rung changes, safest last.
LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("static int8, no folding", {"equalize": "none", "act": "static"}),
    ("static int8, folding searched", {"equalize": "search", "act": "static"}),
    ("static int8, worst layers in float", {"equalize": "search", "rescue": 0.1}),
    ("dynamic int8", {"act": "dynamic", "equalize": "search"}),
    ("int8 weights only", {"act_bits": None}),
)
HALF, FLOAT = "half precision", "float"


class Gates(BaseModel):
    """What a rung must keep, in which runtime."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    target: str = "onnxruntime"
    """Exporter whose files are judged; it must realise schemes."""
    max_drop: float = Field(default=0.003, ge=0, le=1)
    """Largest loss of top-1 of images among the texts of as many pairs, as a fraction."""
    min_speedup: float = Field(default=1.0, ge=0)
    """Least speed over the float files of the same runtime, image tower, 1 thread."""
    num_images: int = Field(default=512, ge=2)
    """Training pairs, of another draw than calibration's, on which accuracy is judged."""
    rounds: int = Field(default=15, ge=1)
    """Timed calls of each, interleaved; medians are compared."""


@dataclass(frozen=True)
class Judged:
    """One rung's figures, and the reason why it was left (None: it was taken)."""

    rung: str
    top1: float
    speedup: float
    reason: str | None


def descend(
    work: Work, make: Callable[[dict[str, Any]], Clip], gates: Gates
) -> tuple[Clip, list[Judged]]:
    """The first rung's model that keeps the gates, or the float one; and what was found.

    `make(settings)` gives the quantized model of a rung. The last two rungs have schemes that round
    nothing, so that an exporter asked for integers writes floats.
    """
    pixels, tokens = held_back(work, gates.num_images)
    module = plugin.find(plugin.EXPORTERS, gates.target)
    with tempfile.TemporaryDirectory() as name:
        module.write(work.clip, module.Config(precision="fp32"), Path(name) / FLOAT)
        plain = module.load(Path(name) / FLOAT, "cpu", 1)
        wanted = top1(plain, pixels, tokens)
        steps = []
        rungs = [(rung, partial(make, settings)) for rung, settings in LADDER]
        for number, (rung, made) in enumerate(
            [*rungs, (HALF, partial(unrounded, work, "float16"))]
        ):
            clip, folder = made(), Path(name) / str(number)
            module.write(clip, module.Config(precision="int8", min_cosine=-1.0), folder)
            encoder = module.load(folder, "cpu", 1)
            found = top1(encoder, pixels, tokens)
            speed = speedup(plain, encoder, pixels[:1], gates.rounds)
            reason = verdict(wanted - found, speed, gates)
            steps.append(Judged(rung, found, speed, reason))
            if reason is None:
                return clip, steps
    return unrounded(work, "float32"), [*steps, Judged(FLOAT, wanted, 1.0, None)]


def unrounded(work: Work, rest: Literal["float32", "float16"]) -> Clip:
    """The float model with a scheme that says so."""
    made = with_scheme(work.clip.model, Scheme(layers={}, rest=rest))
    return work.clip.with_model(made, {"step": "quantize", "fallback": rest})


def held_back(work: Work, num: int) -> tuple[Tensor, Tensor]:
    """Training pairs of another draw than calibration's: pixels [N, 3, H, W], tokens [N, L]."""
    sampler = Sampler(work.data.pairs)
    generator = torch.Generator().manual_seed(work.seed + 1_000_003)
    indices, _ = sampler.draw(min(num, len(sampler.members)), generator)
    images = [work.clip.preprocess(work.data.pairs.image(int(i))) for i in indices]
    captions = sampler.captions(indices, generator)
    return torch.stack(images), work.clip.tokenizer(captions)


def top1(encoder: Encoder, pixels: Tensor, tokens: Tensor) -> float:
    """Share of images whose own text is nearest; equal scores count as lost."""
    scores = encoder.encode_image(pixels) @ encoder.encode_text(tokens).T
    own = scores.diagonal()[:, None]
    return float(((scores >= own).sum(1) == 1).float().mean())


def speedup(plain: Encoder, other: Encoder, pixels: Tensor, rounds: int) -> float:
    """Median time of `plain` over that of `other`, calls interleaved after a warm-up."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds + 3):
        for which, encoder in enumerate((plain, other)):
            start = time.perf_counter()
            encoder.encode_image(pixels)
            times[which].append(time.perf_counter() - start)
    return float(np.median(times[0][3:]) / np.median(times[1][3:]))


def verdict(drop: float, speed: float, gates: Gates) -> str | None:
    """Why a rung cannot be taken; None if it can."""
    if drop > gates.max_drop:
        return f"loses {drop:.1%} of top-1, {gates.max_drop:.1%} allowed"
    if speed < gates.min_speedup:
        return f"{speed:.2f} times the float files' speed, {gates.min_speedup:.2f} needed"
    return None
