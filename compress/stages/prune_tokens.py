"""Fewer image tokens: a schedule of sites, given, computed from a share, or searched by latency.

No weight changes; training after this stage recovers what the schedule costs. BUS ranks patches by
the text, so that an image would have another embedding for each query and no index could hold it:
`selector` here ranks by the image alone, and learns in the distillation that follows.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress import atomic
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.model import ClipModel
from compress.schedule import Method, Reduction, Site
from compress.structure import ClipConfig, VisionConfig, plain_vision
from compress.work import Work

VERSION = 1

MEANS = ("guarded", "tome", "cross")
# Kept tokens are a multiple of this: whole vectors for every runtime's kernels.
MULTIPLE = 8


class Search(BaseModel):
    """A schedule found from measured latency and a few training images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latency: float | None = Field(default=None, gt=0, lt=1)
    """Budget: the share of the full tower's latency to get down to, losing as little as can be."""
    agreement: float | None = Field(default=None, gt=0, lt=1)
    """Budget: the least share of the images whose nearest name of `data.classes` stays, saving as
    much time as can be. Top-1 on such images falls by the rest at most."""
    target: str = "onnxruntime"
    """Exporter whose runtime is timed, with its default settings and one thread."""
    precision: str | None = None
    """Its precision, where it has several."""
    num_images: int = Field(default=64, ge=4)
    """Training images on which reduced and full embeddings are compared; no labels are used. Their
    number is how finely `agreement` is measured."""
    max_sites: int = Field(default=3, ge=1)
    """At most so many sites."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Search":
        if (self.latency is None) == (self.agreement is None):
            raise ValueError("give one of latency, agreement")
        return self


class Config(BaseModel):
    """Settings of the prune_tokens stage: one of macs, keep, r, sites or search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "guarded"
    """How tokens are chosen and merged; see `compress/schedule.py`."""
    macs: float | None = Field(default=None, gt=0, lt=1)
    """Share of the image tower's multiply-adds to get down to, by one keep rate at `at`."""
    keep: float | None = Field(default=None, gt=0, lt=1)
    """Share of the tokens that each site of `at` keeps."""
    r: int | None = Field(default=None, ge=1)
    """Tokens that go in every block but the last, as in ToMe."""
    sites: tuple[Site, ...] | None = None
    """The schedule itself, as a search writes it down."""
    search: Search | None = None
    """Find the sites by measuring."""
    at: tuple[int, ...] | None = None
    """Layers of the sites, from 0; by default after a third and two thirds: on the
    embedded teacher's training images two early sites keep embeddings nearest to the full ones."""
    guard: float = Field(default=0.5, ge=0, lt=1)
    """Share of the last site's tokens that is a fixed grid (guarded, feather)."""
    proportional: bool | None = None
    """Whether merged tokens count in attention as often as they hold patches; by default where
    tokens become means of several (guarded, tome, cross), which it repairs most of."""
    queries: int = Field(default=0, ge=0)
    """Learnt queries that summarise the remaining tokens; they need training."""
    seed: int = 0
    """Draws the places of method random."""
    patch_tokens: Literal["unused", "used", "used, reduce anyway"] = "unused"
    """Whether anybody reads the patch tokens (segmentation, detection, localisation)."""

    @model_validator(mode="after")
    def _one_schedule(self) -> "Config":
        given = [
            n for n in ("macs", "keep", "r", "sites", "search") if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError(f"give one of macs, keep, r, sites, search, not {given or 'none'}")
        return self


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Give `work.clip` a schedule in place of the one it has."""
    vision = plain_vision(work.clip.model.config, "prune_tokens")
    if cfg.patch_tokens == "used":
        raise PocketclipError(
            "prune_tokens.patch_tokens: used: with merged or dropped tokens there is no longer one "
            "feature for each patch, and positions are lost; leave this stage out, or set it to "
            "'used, reduce anyway'"
        )
    if cfg.search is not None:
        from compress.stages import _schedule_search

        reduction = _schedule_search.search(work, cfg, cfg.search, out)
    else:
        reduction = schedule(vision, cfg)
    atomic.write_text(out / "schedule.yaml", recipe_line(cfg, reduction))
    step = {"step": "prune_tokens", "reduction": reduction.model_dump(mode="json")}
    clip = reduced(work.clip, reduction)
    return replace(work, clip=clip.with_model(clip.model, step))


def reduced(clip: Clip, reduction: Reduction | None) -> Clip:
    """The same weights with this schedule; what it learns starts as its constructor makes it."""
    config = clip.model.config
    vision = plain_vision(config, "prune_tokens").model_dump()
    vision["reduction"] = None if reduction is None else reduction.model_dump()
    try:
        changed = ClipConfig.model_validate(config.model_dump() | {"vision": vision})
    except ValidationError as error:
        raise PocketclipError(f"prune_tokens: {error.errors()[0]['msg']}") from None
    model = ClipModel(changed)
    own = model.state_dict()
    state = {k: v for k, v in clip.model.state_dict().items() if k in own}
    with torch.no_grad():
        model.load_state_dict(own | state)
    return replace(clip, model=model.eval())


def schedule(vision: VisionConfig, cfg: Config) -> Reduction:
    """The sites that the settings describe for a tower of this shape."""
    if cfg.sites is not None:
        return with_sites(cfg, cfg.sites)
    if cfg.r is not None:
        patches = vision.grid**2
        keeps = [patches - cfg.r * (n + 1) for n in range(vision.num_layers - 1)]
        if keeps[-1] < 1:
            raise PocketclipError(
                f"prune_tokens.r: {cfg.r} in each of {len(keeps)} blocks is more than {patches}"
            )
        return with_sites(cfg, [Site(layer=n, keep=k) for n, k in enumerate(keeps)])
    rates = [cfg.keep] if cfg.keep is not None else [n / 100 for n in range(99, 4, -1)]
    for rate in rates:
        reduction = with_sites(cfg, list(_at_rate(vision, cfg, rate)))
        if cfg.macs is None:
            return reduction
        if share_of_macs(vision, reduction) <= cfg.macs:
            return _filled(vision, cfg, reduction)
    raise PocketclipError(f"prune_tokens.macs: no keep rate reaches {cfg.macs} with these sites")


def _filled(vision: VisionConfig, cfg: Config, reduction: Reduction) -> Reduction:
    """The schedule with what rounding left of the budget, the last sites first."""
    assert cfg.macs is not None
    sites = list(reduction.sites)
    multiple = vision.grid if cfg.method == "fopru_row" else MULTIPLE
    for n in reversed(range(len(sites))):
        before = sites[n - 1].keep if n else vision.grid**2
        more = sites[n].model_copy(update={"keep": min(before, sites[n].keep + multiple)})
        found = with_sites(cfg, [*sites[:n], more, *sites[n + 1 :]])
        if share_of_macs(vision, found) <= cfg.macs:
            sites[n] = more
    kept = [vision.grid**2, *(site.keep for site in sites)]
    return with_sites(cfg, [site for n, site in enumerate(sites) if site.keep < kept[n]])


def with_sites(cfg: Config, sites: list[Site] | tuple[Site, ...]) -> Reduction:
    """The settings' method at these sites."""
    guard = int(cfg.guard * sites[-1].keep) if cfg.method in ("guarded", "feather") else 0
    return Reduction(
        method=cfg.method,
        sites=tuple(sites),
        guard=guard,
        proportional=cfg.method in MEANS if cfg.proportional is None else cfg.proportional,
        queries=cfg.queries,
        seed=cfg.seed,
    )


def share_of_macs(vision: VisionConfig, reduction: Reduction) -> float:
    """Multiply-adds of the blocks with a schedule over those without; the sites' own are not in."""
    patches, layers = vision.grid**2, vision.num_layers
    first = int(vision.class_token)
    whole = [(patches, patches)] * layers
    fewer = reduction.num_tokens(patches, layers)
    return _macs(vision, fewer, first) / _macs(vision, whole, first)


def recipe_line(cfg: Config, reduction: Reduction) -> str:
    """The schedule as one line of a recipe, with the settings that differ from their defaults."""
    sites = ", ".join(f"{{layer: {s.layer}, keep: {s.keep}}}" for s in reduction.sites)
    computed = {"method", "macs", "keep", "r", "sites", "search", "at"}
    more = cfg.model_dump(mode="json", exclude_defaults=True, exclude=computed)
    rest = "".join(f", {name}: {json.dumps(value)}" for name, value in more.items())
    return f"- prune_tokens: {{method: {reduction.method}, sites: [{sites}]{rest}}}\n"


def _at_rate(vision: VisionConfig, cfg: Config, rate: float) -> Iterator[Site]:
    """Sites that each keep the share `rate`, rounded to whole vectors (or whole rows)."""
    layers, patches = vision.num_layers, vision.grid**2
    at = cfg.at or tuple(sorted({max(0, -(-layers * n // 3) - 1) for n in (1, 2)}))
    multiple = vision.grid if cfg.method == "fopru_row" else MULTIPLE
    before = patches
    for n, layer in enumerate(at):
        keep = max(multiple, round(patches * rate ** (n + 1) / multiple) * multiple)
        least = -(-before // 2) if cfg.method == "tome" else 1
        before = max(least, min(before, keep))
        yield Site(layer=layer, keep=before)


def _macs(vision: VisionConfig, tokens: list[tuple[int, int]], first: int) -> int:
    """Multiply-adds of the blocks with these patch tokens in attention and MLP, by block."""
    total = 0
    shapes = zip(vision.heads, vision.mlp_width, tokens, strict=True)
    for heads, mlp_width, (before, after) in shapes:
        inner, n = heads * vision.head_width, before + first
        total += 4 * n * vision.width * inner + 2 * n * n * inner
        total += 2 * (after + first) * vision.width * mlp_width
    return total
