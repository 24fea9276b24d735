"""Where and how the image tower goes on with fewer tokens, as data.

The schedule stands in model.json. It changes no weight, and no schedule gives the very same graph
as a model without one.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal[
    "guarded",
    "tome",
    "evit",
    "topk",
    "vision_zip",
    "feather",
    "fopru_rank",
    "fopru_row",
    "cross",
    "selector",
    "grid",
    "random",
]
NEEDS_CLASS_TOKEN = ("guarded", "evit", "topk", "vision_zip", "feather", "cross")


class Site(BaseModel):
    """One place where the number of tokens falls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    """Block after whose attention tokens are reduced, counted from 0."""
    keep: int = Field(ge=1)
    """Tokens that go on, the class token not counted, a fused one counted; multiples of 8 suit
    every runtime."""


class Reduction(BaseModel):
    """The schedule of an image tower."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    """guarded: a fixed grid and the best others stay, the rest merge into the most similar (ours).
    tome: pairs of similar tokens merge. evit: the best stay, the rest become one. topk: the best
    stay, the rest go. vision_zip: dominant and contextual tokens. feather: the best and a grid,
    then the best. fopru_rank, fopru_row: by the attention that tokens or grid rows receive. cross:
    merging led by learnt cross tokens. selector: a learnt score. grid, random: baselines."""
    sites: tuple[Site, ...]
    """Where, in ascending order of layers."""
    proportional: bool = False
    """Whether a merged token counts in attention as often as it holds patches (ToMe, 3.3)."""
    guard: int = Field(default=0, ge=0)
    """Tokens on a fixed, even grid that guarded never merges away, and feather not at its first
    site: no region goes unseen."""
    contextual: float = Field(default=0.16, gt=0, lt=1)
    """vision_zip: share of the kept tokens that gather the others; the paper's 10 of 64."""
    queries: int = Field(default=0, ge=0)
    """Learnt queries that summarise the remaining tokens beside the class token (BUS's abstraction,
    our formulation); 0 has none."""
    seed: int = 0
    """random: draws the places, the same for every picture."""

    @model_validator(mode="after")
    def _falls(self) -> "Reduction":
        layers = [site.layer for site in self.sites]
        if layers != sorted(set(layers)):
            raise ValueError(f"sites must have ascending layers, not {layers}")
        keeps = [site.keep for site in self.sites]
        if keeps != sorted(keeps, reverse=True):
            raise ValueError(f"keep must not rise from site to site: {keeps}")
        if self.method in ("guarded", "feather") and any(k <= self.guard for k in keeps):
            raise ValueError(f"guard: {self.guard} leaves nothing to choose of {min(keeps)} kept")
        return self

    def check(self, grid: int, num_layers: int, class_token: bool, pooling: str) -> None:
        """ValueError where a tower of grid x grid patches cannot follow this schedule."""
        if self.method in NEEDS_CLASS_TOKEN and not class_token:
            raise ValueError(
                f"{self.method} ranks patches by the class token's attention, and this tower has "
                "none: take tome, fopru_rank, grid or selector"
            )
        if self.queries and pooling != "class":
            raise ValueError(f"queries add to the class token, pooling is {pooling}")
        before = grid * grid
        for site in self.sites:
            if site.layer > num_layers - 2:
                raise ValueError(
                    f"site at layer {site.layer}: nothing would follow; "
                    f"the last is {num_layers - 2}"
                )
            if site.keep > before:
                raise ValueError(f"layer {site.layer} keeps {site.keep} of {before} tokens")
            if self.method == "tome" and before - site.keep > (before + int(not class_token)) // 2:
                raise ValueError(
                    f"layer {site.layer}: tome merges at most half of {before} tokens, "
                    f"not {before - site.keep}"
                )
            if self.method == "fopru_row" and site.keep % grid:
                raise ValueError(f"fopru_row keeps whole rows of {grid}, {site.keep} isn't")
            before = site.keep

    def num_tokens(self, num_patches: int, num_layers: int) -> list[tuple[int, int]]:
        """Patch tokens in each block's attention and in its MLP."""
        keep = {site.layer: site.keep for site in self.sites}
        found, before = [], num_patches
        for layer in range(num_layers):
            after = min(before, keep.get(layer, before))
            found.append((before, after))
            before = after
        return found
