"""Accuracy of each token reduction on the embedded teacher, training-free; for reduction.py."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import survival
from compress import recipe
from compress.atomic import sha256, write_json
from compress.batches import embed_names
from compress.clip import Clip
from compress.inspect import num_macs
from compress.schedule import Method, Reduction
from compress.sources import open_clip
from compress.stages.exact import pooled_last
from compress.stages.prune_tokens import Config, reduced, schedule, share_of_macs
from compress.structure import plain_vision
from compress.work import Data

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "recipes/emoji"
SPLITS = ("held_out_style", "val")
TEMPLATES = ("{}", "an emoji of {}", "{} emoji", "a picture of {}")
METHODS: tuple[Method, ...] = (
    "guarded",
    "tome",
    "evit",
    "grid",
    "random",
    "topk",
    "feather",
    "vision_zip",
    "cross",
    "fopru_rank",
    "fopru_row",
)
SHARES = (0.75, 0.6)
DEEP = (0.5, 0.4)
"""Further shares beside the exact passes: what the fastest towers would cost."""
THREE = (1, 2, 4)
"""Sites at which methods are compared; the default has two."""
MORE_SHARES = (0.85, 0.5)
NUM_PICTURES = 128
"""Pictures whose surviving regions are counted."""
BATCH = 64
Rows = list[dict[str, Any]]


def arms(quick: bool = False) -> dict[str, Config]:
    """Name -> settings of the prune_tokens stage."""
    found = {}
    for share in SHARES:
        for method in METHODS[:2] if quick else METHODS:
            found[f"{method} {share:.2f}"] = Config(method=method, macs=share, at=THREE)
    if not quick:
        for method in METHODS[:3]:
            for share in MORE_SHARES:
                found[f"{method} {share:.2f}"] = Config(method=method, macs=share, at=THREE)
        for name in METHODS[:2]:
            plain = Config(method=name, macs=0.75, at=THREE, proportional=False)
            found[f"{name} not proportional 0.75"] = plain
        found["tome every block r8"] = Config(method="tome", r=8)
    return found


EXACT = "exact + "
"""How the names of arms begin whose last block is computed for the pooled token alone."""


def exact_arms(clip: Clip, quick: bool = False) -> dict[str, Config]:
    """Arms beside the exact passes: the fewest tokens lost for a share of multiply-adds that counts
    what the last block saves, which costs nothing.
    """
    settings: dict[str, dict[str, Any]] = {"guarded": {}}
    if not quick:
        settings |= {"guarded three sites": {"at": THREE}, "tome": {"method": "tome"}}
    wanted = [(share, name) for share in SHARES for name in settings]
    if not quick:
        settings["guarded one site"] = {"at": (1,)}
        wanted += [(share, name) for share in DEEP for name in ("guarded", "guarded one site")]
    found = {}
    for share, name in wanted:
        tried = (Config(macs=n / 100, **settings[name]) for n in range(99, 10, -1))
        fits = (cfg for cfg in tried if share_of(clip, pooled(clip, cfg)) <= share)
        found[f"{EXACT}{name} {share:.2f}"] = next(fits)
    return found


def pooled(clip: Clip, cfg: Config) -> Clip:
    """The model with a schedule and the exact pass over its last block."""
    vision = plain_vision(clip.model.config, "reduction")
    return pooled_last(reduced(clip, schedule(vision, cfg)))


def share_of(clip: Clip, changed: Clip) -> float:
    """Multiply-adds of the changed image tower over those of the whole one."""
    after, before = num_macs(changed.model.config), num_macs(clip.model.config)
    return after["image"] / before["image"]


class Tasks:
    """The held-out splits as pixels and labels, the teacher, and its embeddings of all names."""

    def __init__(self, num_images: int | None = None) -> None:
        self.num_images = num_images
        self.teacher = open_clip.load(f"local-dir:{EMOJI / 'teacher'}")
        shards = {split: (EMOJI / f"data/{split}.tar.xz",) for split in SPLITS}
        classes = EMOJI / "data/concepts.json"
        self.data = Data(evaluate=shards, classes_file=classes, templates=TEMPLATES)

    @cached_property
    def digest(self) -> str:
        """Names the teacher: what was measured of another one is another's."""
        weights = EMOJI / "teacher/open_clip_model.safetensors"
        return sha256(weights)[:12]

    @cached_property
    def classes(self) -> Tensor:
        """[C, E]; no method here touches the text tower."""
        names = [name for _, name in self.data.classes]
        return embed_names(self.teacher, names, list(TEMPLATES))

    @cached_property
    def splits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Split -> pixels [N, 3, H, W] and class indices [N]."""
        place = {concept: n for n, (concept, _) in enumerate(self.data.classes)}
        found = {}
        for name in SPLITS:
            pairs = self.data.split(name)
            num = min(len(pairs), self.num_images or len(pairs))
            pixels = torch.stack([self.teacher.preprocess(pairs.image(i)) for i in range(num)])
            assert pairs.concepts is not None
            found[name] = (pixels, torch.tensor([place[c] for c in pairs.concepts[:num]]))
        return found

    def top1(self, clip: Clip, split: str, classes: Tensor | None = None) -> Tensor:
        """Whether each image's nearest name is its own: [N] of zeros and ones.

        classes: [C, E] of another text tower than the teacher's.
        """
        pixels, labels = self.splits[split]
        with torch.no_grad():
            parts = [clip.model.encode_image(part) for part in pixels.split(BATCH)]
        scores = (
            F.normalize(torch.cat(parts), dim=-1) @ (self.classes if classes is None else classes).T
        )
        return (scores.argmax(dim=-1) == labels).float()


def clips(clip: Clip, quick: bool = False) -> dict[str, Clip]:
    """Name of each arm -> the model that it measures."""
    vision = plain_vision(clip.model.config, "reduction")
    torch.manual_seed(0)
    return {
        name: pooled(clip, cfg) if exact else reduced(clip, schedule(vision, cfg))
        for name, (cfg, exact) in _all_arms(clip, quick).items()
    }


def training_data() -> Data:
    """What recipes train and calibrate on."""
    return recipe.load(EMOJI / "tokens.yaml").shards()


def measure(
    folder: Path, tasks: Tasks, quick: bool, chosen: Sequence[str] | None, committed: Rows
) -> Rows:
    """Rows of every arm (or of those named) and split, each kept in `folder` once measured.

    committed: rows of an earlier session. Those of an arm stand where its sites are still the same
    and the untouched teacher has just scored what it scored then.
    """
    vision = plain_vision(tasks.teacher.model.config, "reduction")
    rows = _kept(folder / "none.json", lambda: _arm(tasks, tasks.teacher, "none", None, 1.0))
    known = {row["split"]: row["top1"] for row in committed if row["arm"] == "none"}
    if known != {row["split"]: row["top1"] for row in rows}:
        committed = []
    for name, (cfg, exact) in _all_arms(tasks.teacher, quick).items():
        torch.manual_seed(0)
        found = schedule(vision, cfg)
        if chosen is not None and name not in chosen:
            rows += _standing(committed, name, found)
            continue
        clip = pooled(tasks.teacher, cfg) if exact else reduced(tasks.teacher, found)
        share = share_of(tasks.teacher, clip) if exact else share_of_macs(vision, found)
        path = folder / f"{name.replace(' ', '-')}.json"
        rows += _standing(committed, name, found) or _kept(
            path,
            lambda: _arm(tasks, clip, name, found, share),  # noqa: B023
        )
    return rows


def _all_arms(clip: Clip, quick: bool) -> dict[str, tuple[Config, bool]]:
    """Name -> settings, and whether the exact passes count."""
    plain = {name: (cfg, False) for name, cfg in arms(quick).items()}
    return plain | {name: (cfg, True) for name, cfg in exact_arms(clip, quick).items()}


def _standing(committed: Rows, name: str, found: Reduction) -> Rows:
    """The rows of an arm that was measured with these very sites."""
    sites = [site.model_dump() for site in found.sites]
    return [row for row in committed if row["arm"] == name and row["sites"] == sites]


def _arm(tasks: Tasks, clip: Clip, name: str, found: Reduction | None, share: float) -> Rows:
    rows = []
    for split in SPLITS:
        right = tasks.top1(clip, split)
        row: dict[str, Any] = {
            "part": "accuracy",
            "arm": name,
            "method": found.method if found else "none",
            "sites": [s.model_dump() for s in found.sites] if found else [],
            "macs": round(share, 4),
            "split": split,
            "num_images": len(right),
            "top1": float(right.mean()),
        }
        if found is not None:
            lost = survival.lost_regions(
                survival.surviving(clip, tasks.splits[split][0][:NUM_PICTURES])
            )
            row["mean_lost_regions"] = float(lost.mean())
            row["worst_lost_regions"] = float(lost.max())
        rows.append(row)
    return rows


def _kept(path: Path, make: Any) -> Rows:
    """What an earlier run measured, or a new measurement."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    rows: Rows = json.loads(path.read_text())
    return rows
