"""The models of `targets.py`: the embedded teacher, its students, and named architectures."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.target_claims import STUDENT
from compress import clip as clips
from compress import plugin
from compress import recipe as recipes
from compress.clip import Clip
from compress.work import Work

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
TRAINED = ROOT / "runs/quickstart/01-distill"
"""Where `make quickstart` leaves its student."""
SEED = 0
TEACHER = "embedded teacher"


def open_clip(name: str) -> Callable[[], Clip]:
    """An architecture of open_clip with random weights."""
    return lambda: plugin.source(f"open_clip:{name}/random", ROOT)


def teacher() -> Clip:
    """The embedded teacher with the emoji data to calibrate and to measure on."""
    recipe = recipes.load(RECIPE)
    return replace(plugin.source(recipe.model, recipe.folder), data=recipe.shards())


def student(**stages: dict[str, Any]) -> Clip:
    """The quickstart's student where it has run, else as inheritance leaves it.

    stages: further stages with their settings.
    """
    recipe = recipes.load(RECIPE)
    clip, data = teacher(), recipe.shards()
    if (TRAINED / "model.json").is_file():
        clip = replace(clips.load(TRAINED), data=data)
    else:
        inherit = next(step.config for step in recipe.stages if step.name == "inherit")
        stages = {"inherit": inherit.model_dump(), **stages}
    for name, settings in stages.items():
        stage = plugin.find(plugin.STAGES, name)
        with tempfile.TemporaryDirectory() as folder:
            work = Work(clip, clip, data, "cpu", SEED)
            clip = stage.run(work, stage.Config.model_validate(settings), Path(folder)).clip
    return replace(clip, data=data)


def quantized() -> Clip:
    """The student with 8-bit weights and inputs, ranges of 32 training pairs."""
    return student(quantize={"equalize": "none", "num_images": 32})


def reduced() -> Clip:
    """The student with half of its image tokens merged on the way."""
    return student(prune_tokens={"keep": 0.5})


SOURCES: dict[str, Callable[[], Clip]] = {
    TEACHER: teacher,
    STUDENT: student,
    "quantized student": quantized,
    "token-reduced student": reduced,
    "ViT-B/32": open_clip("ViT-B-32"),
    "ViT-B/16": open_clip("ViT-B-16"),
    "MobileCLIP2-S0": open_clip("MobileCLIP2-S0"),
    "SigLIP B/16": open_clip("ViT-B-16-SigLIP"),
}


def trained(clip: Clip) -> bool:
    """Whether a model's weights were learnt: random ones show shapes, not accuracy."""
    steps = {step.get("step") for step in clip.provenance}
    return "distill" in steps or any("sha256" in step for step in clip.provenance)


def opened(source: str, kept: Path) -> Clip:
    """A model of `SOURCES`; one that stages have changed is kept in a folder for the next case."""
    recipe = recipes.load(RECIPE)
    if (kept / "model.json").is_file():
        return replace(clips.load(kept), data=recipe.shards())
    clip = SOURCES[source]()
    if source in ("quantized student", "token-reduced student"):
        clips.save(clip, kept)
    return clip
