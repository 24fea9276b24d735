"""Whether reduced models compute the same in every installed runtime; for reduction.py.

Every method on a small tower with random weights, in each runtime's first precision; and the
embedded teacher, as the default reduces it, in every precision, integers among them. The gates are
the exporters' own. Runtimes have processes of their own, so that a converter may crash.
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


Case = tuple[str, Method, str, str | None]
"""Model, method, target, precision."""


def cases(quick: bool = False) -> list[Case]:
    """What is tried, by model and method."""
    found = [c for c in _contract.cases() if c[0] in RUNTIMES]
    first = dict(reversed(found))
    methods: tuple[Method, ...] = ("guarded",) if quick else get_args(Method)
    chosen: list[Case] = [
        (SMALL, method, target, first[target]) for method in methods for target in RUNTIMES
    ]
    return chosen if quick else chosen + [(TEACHER, "guarded", *case) for case in found]


def measure(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Rows of every case, each kept in `folder` once measured."""
    chosen = cases(quick)
    for key in dict.fromkeys((model, target) for model, _, target, _ in chosen):
        _measured([c for c in chosen if (c[0], c[2]) == key], folder)
    rows: list[dict[str, Any]] = []
    for case in chosen:
        found = json.loads(_path(folder, case).read_text())
        about = {"part": "parity", "model": case[0], "method": case[1]}
        rows += [about | row for row in found if row["tower"] == "image"]
    return rows


def _measured(chosen: list[Case], folder: Path) -> None:
    """Cases of one runtime, in as few processes as crashes allow: importing a converter takes
    longer than most cases.
    """
    while missing := [case for case in chosen if not _path(folder, case).exists()]:
        log = _path(folder, missing[0]).with_suffix(".log")
        reason = _forked.call(_prove_all, (missing, folder), log)
        left = next((case for case in missing if not _path(folder, case).exists()), None)
        if left is not None:
            row = {"target": left[2], "precision": left[3], "tower": "image"}
            path = _path(folder, left)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            write_json(path, [{**row, "passed": False, "kind": "crashed", "reason": reason}])


def _path(folder: Path, case: Case) -> Path:
    """Where the rows of a case are kept."""
    stem = " ".join(map(str, case)).replace(" ", "-").replace(",", "")
    return folder / f"{stem}.json"


def _prove_all(chosen: list[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    for model, method, target, precision in chosen:
        path = _path(folder, (model, method, target, precision))
        torch.manual_seed(0)
        clip = open_clip.load(f"local-dir:{accuracy.EMOJI / 'teacher'}")
        clip = replace(clip, data=accuracy.training_data()) if model == TEACHER else _small(clip)
        clip = accuracy.pooled(clip, Config(method=method, macs=0.75))
        rows = _contract.prove(clip, target, precision, path.with_suffix(""))
        write_json(path, rows)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def _small(clip: Clip) -> Clip:
    """Towers that export in a second or two, with the given model's contracts."""
    shape: dict[str, Any] = {"head_width": 32, "heads": (2,) * 4, "mlp_width": (128,) * 4}
    vision = VisionConfig(image_size=64, patch_size=8, width=64, **shape)
    length = clip.tokenizer.contract.context_length
    text = TextConfig(vocab_size=4096, context_length=length, width=64, **shape)
    model = ClipModel(ClipConfig(embed_dim=64, vision=vision, text=text))
    initialise_(model)
    return replace(clip, model=model.eval(), name="small")
