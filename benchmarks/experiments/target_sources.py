"""The models of `targets.py`: the embedded teacher, its students, and named architectures."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.target_claims import STUDENT
from compress import clip as clips
from compress import plugin
from compress import recipe as recipes
from compress.clip import Clip
from compress.sources import open_clip as source
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


def siglip(name: str) -> Clip:
    """An architecture of open_clip whose tokenizer only a hub has, from a folder such as open_clip
    writes: random weights, and a tokenizer of bytes with SigLIP's marks.
    """
    import open_clip as library
    from safetensors.torch import save_file

    from benchmarks.experiments.model_families import byte_tokenizer

    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        byte_tokenizer(folder, canonical=True)
        settings = library.get_model_config(name)
        settings["text_cfg"]["hf_tokenizer_name"] = "tokenizer"
        preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
        described = {"model_cfg": settings, "preprocess_cfg": preprocess}
        described["license"] = "none: random weights"
        (folder / "open_clip_config.json").write_text(json.dumps(described))
        tensors = library.create_model(name).state_dict()
        weights = {key: value.contiguous() for key, value in tensors.items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        found = source.load(f"local-dir:{folder}")
        return replace(found, name=name, provenance=({"step": "random", "name": name},))


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
    "SigLIP B/16": partial(siglip, "ViT-B-16-SigLIP"),
}
TIMED = ("ViT-B/16",)
"""Sources of which one precision a target is tried, for the time that an export takes."""


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
