"""Whether reduced models compute the same in every installed runtime; for reduction.py.

Every method on a small tower with random weights, in each runtime's first precision; and the
embedded teacher, as the default reduces it, in every precision, integers among them. The gates are
the exporters' own. Each case runs in a process of its own, so that a converter may crash.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.experiments import _forked
from benchmarks.experiments import _reduction_accuracy as accuracy
from compress.atomic import write_json
from compress.clip import Clip
from compress.model import ClipModel, initialise_
from compress.schedule import Method
from compress.sources import open_clip
from compress.stages.prune_tokens import Config
from compress.structure import ClipConfig, TextConfig, VisionConfig
from export import _contract

RUNTIMES = ("onnx", "onnxruntime", "openvino", "litert", "mnn", "ncnn", "executorch", "web")
"""Targets whose runtime computes here; the others are proved without executing or not at all."""
TEACHER = "embedded teacher"
SMALL = "small tower, random weights"
TRAINED_ONLY = ("cross", "selector")
"""Methods that learn: here as they start."""


def cases(quick: bool = False) -> list[tuple[str, str, str, str | None]]:
    """(model, method, target, precision)."""
    found = [c for c in _contract.cases() if c[0] in RUNTIMES]
    first = dict(reversed(found))
    methods: tuple[Method, ...] = ("guarded",) if quick else get_args(Method)
    chosen: list[tuple[str, str, str, str | None]] = [
        (SMALL, method, target, first[target]) for method in methods for target in RUNTIMES
    ]
    return chosen if quick else chosen + [(TEACHER, "guarded", *case) for case in found]


def measure(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Rows of every case, each kept in `folder` once measured."""
    rows: list[dict[str, Any]] = []
    for model, method, target, precision in cases(quick):
        about = {"part": "parity", "model": model, "method": method}
        stem = f"{model} {method} {target} {precision}".replace(" ", "-").replace(",", "")
        path = folder / f"{stem}.json"
        if not path.exists():
            chosen = (model, method, target, precision, path)
            reason = _forked.call(_prove, chosen, path.with_suffix(".log"))
            if not path.exists():
                row = {"target": target, "precision": precision, "tower": "image"}
                write_json(path, [{**row, "passed": False, "kind": "crashed", "reason": reason}])
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        found = json.loads(path.read_text())
        rows += [about | row for row in found if row["tower"] == "image"]
    return rows


def _prove(model: str, method: Method, target: str, precision: str | None, path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clip = open_clip.load(f"local-dir:{accuracy.EMOJI / 'teacher'}")
    clip = replace(clip, data=accuracy.training_data()) if model == TEACHER else _small(clip)
    clip = accuracy.pooled(clip, Config(method=method, macs=0.75))
    write_json(path, _contract.prove(clip, target, precision, path.with_suffix("")))


def _small(clip: Clip) -> Clip:
    """Towers that export in a second or two, with the given model's contracts."""
    shape: dict[str, Any] = {"head_width": 32, "heads": (2,) * 4, "mlp_width": (128,) * 4}
    vision = VisionConfig(image_size=64, patch_size=8, width=64, **shape)
    length = clip.tokenizer.contract.context_length
    text = TextConfig(vocab_size=4096, context_length=length, width=64, **shape)
    model = ClipModel(ClipConfig(embed_dim=64, vision=vision, text=text))
    initialise_(model)
    return replace(clip, model=model.eval(), name="small")
