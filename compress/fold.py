"""Folds what exists for training only: convolutions with parallel branches become one each.

Files and timings are made of folded models. Plain transformers have nothing to fold.
"""

import copy

from torch import nn

from compress.clip import Clip
from compress.errors import PocketclipError
from compress.upstream import UpstreamTower, folded, needs_folding


def fold(clip: Clip) -> Clip:
    """The same function with every training branch folded; the same clip if there is none.

    A tower without branches keeps its weights where they are: they may not be changed in place.
    """
    if not unfolded(clip):
        return clip
    plain = [t for t in (clip.model.image, clip.model.text) if not _has_branches(t)]
    shared = {id(t): t for tower in plain for t in (*tower.parameters(), *tower.buffers())}
    model = copy.deepcopy(clip.model, shared).eval()
    towers = {}
    for name, tower in (("vision", model.image), ("text", model.text)):
        if _has_branches(tower):
            assert isinstance(tower, UpstreamTower)
            tower.tower = folded(tower.tower)
            tower.config = tower.config.model_copy(update={"folded": True})
            towers[name] = tower.config
    model.config = model.config.model_copy(update=towers)
    return clip.with_model(model, {"step": "fold"})


def unfolded(clip: Clip) -> list[str]:
    """Names of the towers that still have training branches."""
    return [
        tower.config.name
        for tower in (clip.model.image, clip.model.text)
        if isinstance(tower, UpstreamTower) and _has_branches(tower)
    ]


def _has_branches(tower: nn.Module) -> bool:
    return isinstance(tower, UpstreamTower) and needs_folding(tower)


def check_folded(clip: Clip) -> None:
    """PocketclipError if the model would be written or timed in its training form."""
    names = unfolded(clip)
    if names:
        raise PocketclipError(
            f"{clip.name}: {', '.join(names)} still has the branches it is trained with, which "
            "would be written and timed too; call compress.fold.fold(clip) first"
        )
