"""The arms of the distillation experiment: what each student starts from and learns from."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Settings = dict[str, Any]

STUDENT = Path(__file__).parents[2] / "recipes/emoji/student.json"
"""The structure of a student that starts from random weights."""
SEEDS = (0, 1, 2)
BUDGETS = (24, 240)
"""Optimiser steps of BATCH samples; the first is a tenth of the last."""
BATCH = 256
BETWEEN = 80
"""Steps at which scratch and the best arms are measured too."""
LONG, LONGEST = 1500, 4000
"""Steps of the best arms' long runs. The first has as many pictures as three fifths of the
quickstart's, and as many texts, which cost a tenth."""


@dataclass(frozen=True)
class Arm:
    """One way to make a student."""

    inherit: Settings | None
    """Settings of inheritance; None starts from random weights."""
    distill: tuple[Settings, ...]
    """Settings of each distill stage, one after the other."""
    shares: tuple[float, ...] = (1.0,)
    """Each stage's share of the samples; an image counts, and so does a text without one."""
    pooled_last: bool = False
    """Whether the last blocks compute the token that is read alone: the same embeddings, cheaper
    steps."""

    @property
    def calibrated(self) -> int:
        """Training pairs that inheritance looks at; they count as samples."""
        return int((self.inherit or {}).get("num_samples", 0))


SHARED: Settings = {
    "batch_size": BATCH, "optimizer": "muon", "lr": 2.5e-3, "weight_decay": 0.05, "warmup_steps": 4,
    "augment": {"hue": 0.05, "saturation": 0.35, "grey": 0.05}, "checkpoint_every": 1000,
    "phases": [{"until": 0.6, "image_size": 32}, {"until": 0.8, "image_size": 64, "keep": 0.5}],
}  # fmt: skip
PLAIN: Settings = {"affinity": 0.0, "clip": 1.0, "scale": None, "teacher": "online"}
AFFINITY: Settings = {"affinity": 1.0, "teacher": "reinforced", "synthetic": "mix"}
MIX: Settings = {
    "affinity": 0.0, "clip": 1.0, "divergence": 1.0, "feature": 3.90625 * 2, "interactive": 1.0,
    "scale": None, "teacher_scale": None, "teacher": "reinforced", "synthetic": "mix",
}  # fmt: skip
REINFORCED: Settings = {"affinity": 1.0, "teacher": "reinforced", "synthetic": "sum"}
BEST: Settings = {
    "affinity": 1.0, "feature": 5.0, "bank": 1.0, "teacher": "stored", "views": 16, "lr": 1.5e-3,
    "phases": [{"until": 0.7, "image_size": 64, "keep": 0.5}],
}  # fmt: skip
"""A student fitted at 64 pixels starts there: at 32 it would forget first."""
PRINCIPAL: Settings = {
    "vision": {"width": 136, "heads": 4, "layers": 6}, "text": {"width": 64, "layers": 3},
    "weights": "principal", "num_samples": 2048,
}  # fmt: skip
"""A deeper image tower and a narrower text tower of the same size together: nearly all that the
quickstart's student loses is lost by its image tower."""
IMAGE: Settings = {
    "towers": ["image"], "affinity": 0.0, "feature": 5.0, "bank": 1.0, "batch_size": 128,
    "lr": 2.5e-3, "warmup_steps": 30, "teacher": "reinforced",
    "synthetic": "none", "phases": [{"until": 0.8, "image_size": 64, "keep": 0.5}],
    "checkpoint_every": 200,
}  # fmt: skip
TEXT: Settings = {
    "towers": ["text"], "affinity": 1.0, "feature": 5.0, "lr": 5e-3, "warmup_steps": 30,
    "teacher": "reinforced", "synthetic": "mix", "phases": [],
}  # fmt: skip
"""Each tower learns towards the teacher's own embeddings; what is learnt of one picture or text
needs no others, so that small batches, and with them more steps, serve."""
SHAPE: Settings = {"vision": {"width": 128, "layers": 5}, "text": {"width": 96, "layers": 3}}
HALF: Settings = {"vision": {"layers": 5}, "text": {"layers": 3}}

SCRATCH, AUTO, ALL, APART = "scratch", "auto inheritance + affinity", "all", "towers apart"
OWN = "towers apart, own names"
ARMS: dict[str, Arm] = {
    SCRATCH: Arm(None, (PLAIN,)),
    "affinity": Arm(None, (AFFINITY,)),
    "CLIP-KD mix": Arm(None, (MIX,)),
    "reinforced": Arm(None, (REINFORCED,)),
    "inheritance": Arm(SHAPE, (PLAIN,)),
    "inheritance + affinity": Arm(SHAPE, (AFFINITY,)),
    "inheritance + CLIP-KD mix": Arm(SHAPE, (MIX,)),
    "inheritance + reinforced": Arm(SHAPE, (REINFORCED,)),
    AUTO: Arm(HALF, (AFFINITY,)),
    ALL: Arm(PRINCIPAL, (BEST,)),
    APART: Arm(PRINCIPAL, (TEXT, IMAGE), shares=(0.5, 0.5), pooled_last=True),
    OWN: Arm(PRINCIPAL, (TEXT, {**IMAGE, "own_bank": True}), shares=(0.5, 0.5), pooled_last=True),
}


def num_samples(steps: int) -> int:
    """Training pairs of a budget."""
    return steps * BATCH


def distill_settings(arm: str, steps: int) -> list[Settings]:
    """Settings of each distill stage of an arm, within a budget of `steps`; without the stages that
    the budget has no step for.
    """
    chosen = ARMS[arm]
    found: list[Settings] = []
    for share, own in zip(chosen.shares, chosen.distill, strict=True):
        settings = {**SHARED, **own}
        batch = settings["batch_size"]
        calibrated = math.ceil(share * chosen.calibrated / batch)
        settings["steps"] = int(share * num_samples(steps)) // batch - calibrated
        full = {ALL: BUDGETS[-1], APART: LONG, OWN: LONGEST}.get(arm, 0)
        if steps < full:
            settings["lr"] *= math.sqrt(steps / full)  # no time to come back from large steps
        if arm == AUTO:
            settings["inherit"] = inherit_settings(steps)
        found += [settings] if settings["steps"] > 0 else []
    return found


def inherit_settings(steps: int) -> Settings:
    """Automatic inheritance down to about the student's prunable parameters, in a third of the
    steps: 20 steps of a small model would not move masks at TinyCLIP's rate.
    """
    prune_step = max(2, steps // 3)
    return {"keep": 0.2, "prune_step": prune_step, "ramp_steps": max(1, prune_step * 3 // 4),
            "lr": 0.3, "two_sided": True, "multiple_of": 8}  # fmt: skip


def digest(arm: str, steps: int) -> str:
    """Which settings a row is of; a row of other settings doesn't stand any more."""
    given = [ARMS[arm].inherit, ARMS[arm].pooled_last, distill_settings(arm, steps)]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def jobs(quick: bool) -> list[tuple[str, int, int]]:
    """(arm, seed, steps) of every training, the best arms at last."""
    if quick:
        return [(arm, 0, 4) for arm in ARMS]
    others = [arm for arm in ARMS if arm not in (ALL, APART, OWN)]
    found = [(arm, seed, n) for seed in SEEDS for n in BUDGETS for arm in others]
    found += [(SCRATCH, seed, BETWEEN) for seed in SEEDS]
    found += [(arm, seed, n) for arm in (ALL, APART) for seed in SEEDS
              for n in (0, *BUDGETS, BETWEEN)]  # fmt: skip
    long = [(OWN, LONGEST), (APART, LONG)]
    return found + [(arm, seed, n) for arm, n in long for seed in SEEDS]
