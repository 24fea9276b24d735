"""Latency of reduced image towers with random weights, batch 1, one thread; for reduction.py.

Every file of a tower is timed in turns with the others, ONNX Runtime's float32 graph of the
untouched tower among them. Graphs are checked against the torch model on one picture; accuracy is
not measured here, as random weights have none.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.experiments import _forked
from compress.atomic import write_json
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.fold import fold
from compress.freed import give_back
from compress.inspect import num_macs
from compress.model import ClipModel, initialise_
from compress.preprocess import Preprocess
from compress.schedule import Site
from compress.sources import open_clip
from compress.stages.exact import pooled_last
from compress.stages.prune_tokens import Config, reduced, schedule
from compress.structure import ClipConfig, TextConfig, VisionConfig, plain_vision
from compress.tokenizer import Tokenizer
from export import _int8, _integers
from export import onnx as portable

MODELS = {"B/32": (224, 32, 768, 12), "B/16": (224, 16, 768, 12), "L/14@336": (336, 14, 1024, 24)}
"""Name -> image side, patch side, width, layers; heads are 64 wide, MLPs 4 times the width."""
VARIANTS: dict[str, Config | None] = {
    "full": None,
    "exact": None,
    "exact + guarded 0.75": Config(method="guarded", macs=0.75),
    "exact + guarded 0.60": Config(method="guarded", macs=0.6),
    "exact + guarded 0.45": Config(method="guarded", macs=0.45),
    "exact + guarded one site 0.45": Config(method="guarded", macs=0.45, at=(1,)),
    "exact + guarded one site 0.40": Config(method="guarded", macs=0.4, at=(1,)),
}
WHOLE_TILES = {"B/16": ((3, 79), (7, 15)), "L/14@336": ((7, 191), (15, 63))}
"""Schedules of about 0.45 whose tokens fill tiles of 16 rows, the class token counted."""
CONVOLUTIONS = "MobileCLIP2-S0"
"""A tower whose tokens nobody can drop, for comparison: its own library builds it."""
NAMES = (*MODELS, CONVOLUTIONS)
TEACHER = "emoji teacher"
"""The embedded one, every arm of the accuracy part."""
LARGE = ("L/14@336",)
"""Towers whose float32 files are too big to hold beside each other: the untouched one only."""
ROUNDS, MAX_SECONDS = 15, 150
Call = Callable[[np.ndarray], np.ndarray]


def model(name: str, tokenizer: Tokenizer) -> Clip:
    """A CLIP with this image tower, random weights, and a text tower that nobody runs."""
    if name == CONVOLUTIONS:
        return replace(fold(open_clip.load(f"{name}/random")), name=name)
    side, patch, width, layers = MODELS[name]
    shape: dict[str, Any] = {"width": width, "head_width": 64, "heads": (width // 64,) * layers}
    vision = VisionConfig(
        image_size=side, patch_size=patch, mlp_width=(4 * width,) * layers, **shape
    )
    length = tokenizer.contract.context_length
    small: dict[str, Any] = {"width": 64, "head_width": 64, "heads": (1,), "mlp_width": (64,)}
    text = TextConfig(vocab_size=4096, context_length=length, **small)
    torch.manual_seed(0)
    built = ClipModel(ClipConfig(embed_dim=512, vision=vision, text=text))
    initialise_(built)
    preprocess = Preprocess(size=(side, side), mean=(0.5,) * 3, std=(0.5,) * 3)
    return Clip(built.eval(), preprocess, tokenizer, name, "none: random weights")


def variants(clip: Clip, quick: bool) -> Iterator[tuple[str, Clip]]:
    """The untouched tower, the exact passes, and schedules on top of them; one at a time, as those
    of a large tower fill the memory.
    """
    yield "full", clip
    if not isinstance(clip.model.config.vision, VisionConfig):
        return
    vision = plain_vision(clip.model.config, "reduction")
    chosen = list(VARIANTS.items())[: 3 if quick else None]
    if clip.name in WHOLE_TILES and not quick:
        sites = tuple(Site(layer=layer, keep=keep) for layer, keep in WHOLE_TILES[clip.name])
        chosen.append(("exact + guarded whole tiles", Config(method="guarded", sites=sites)))
    for name, cfg in chosen[1:]:
        yield name, pooled_last(clip if cfg is None else reduced(clip, schedule(vision, cfg)))


def measure(
    folder: Path, names: list[str], tokenizer: Tokenizer, quick: bool
) -> list[dict[str, Any]]:
    """Rows of every tower, each tower kept in `folder` once measured."""
    rows: list[dict[str, Any]] = []
    for name in names:
        path = folder / f"{name.replace('/', '-')}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, _tower(model(name, tokenizer), folder, quick))
        rows += json.loads(path.read_text())
    return rows


def of_arms(folder: Path, teacher: Clip, arms: dict[str, Clip]) -> list[dict[str, Any]]:
    """Rows of the embedded teacher in ONNX Runtime's int8, one an arm of the accuracy part."""
    path = folder / "arms.json"
    if not path.exists():
        pixels = torch.randn(1, 3, *teacher.preprocess.size)
        calls: dict[str, Call] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name, clip in {"none": teacher, **arms}.items():
            file = folder / f"{name.replace(' ', '-')}.onnx"
            portable.save(_int8.rewrite(portable.graph(clip, "image", 1, 20)), file)
            calls[name] = onnxruntime(file)
        rows = []
        for name, samples in zip(calls, in_turns(list(calls.values()), pixels, 200), strict=True):
            row: dict[str, Any] = {"part": "latency", "model": TEACHER, "variant": name}
            row |= {"target": "onnxruntime", "precision": "int8"} | medians(samples)
            rows.append(row)
        write_json(path, rows)
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def medians(samples: np.ndarray) -> dict[str, Any]:
    wall, processor = np.median(samples, axis=0)
    return {
        "p50_ms": float(wall),
        "processor_p50_ms": float(processor),
        "num_queries": len(samples),
        "cpu": machine.short(),
    }


def _tower(clip: Clip, folder: Path, quick: bool) -> list[dict[str, Any]]:
    pixels = torch.randn(1, 3, *clip.preprocess.size, generator=torch.Generator().manual_seed(1))
    whole = num_macs(clip.model.config)["image"]
    about, calls = {}, []
    place = folder / clip.name.replace("/", "-")
    for name, changed in variants(clip, quick):
        with torch.no_grad():
            wanted = F.normalize(changed.model.encode_image(pixels), dim=-1)
        share = num_macs(changed.model.config)["image"] / whole
        about[name] = wanted, share
        _write(changed, place, name)
        give_back()
    rows = []
    for name, (wanted, share) in about.items():
        small = name == "full" or clip.name not in LARGE
        for target, precision, call in _opened(clip, place, name, small):
            found = torch.from_numpy(call(pixels.numpy()))
            calls.append(call)
            rows.append(
                {
                    "part": "latency",
                    "model": clip.name,
                    "variant": name,
                    "target": target,
                    "precision": precision,
                    "macs": round(share, 4),
                    "cosine": float(F.cosine_similarity(wanted, found)),
                }
            )
    for row, samples in zip(rows, in_turns(calls, pixels), strict=True):
        row |= medians(samples)
    return rows


def in_turns(calls: list[Call], pixels: Tensor, rounds: int = ROUNDS) -> list[np.ndarray]:
    """Milliseconds of each call [Q, 2], on the wall and of processors; a round runs each once, so
    that a disturbance hits all alike."""
    array = np.ascontiguousarray(pixels.numpy())
    samples: list[list[tuple[float, float]]] = [[] for _ in calls]
    order = np.random.default_rng(0)
    end = time.monotonic() + MAX_SECONDS
    for round_ in range(rounds + 1):
        for n in order.permutation(len(calls)):
            processor, wall = time.process_time(), time.perf_counter()
            calls[n](array)
            spent = (time.perf_counter() - wall, time.process_time() - processor)
            if round_:
                samples[n].append((spent[0] * 1e3, spent[1] * 1e3))
        if time.monotonic() > end and round_ > 2:
            break
    return [np.array(row) for row in samples]


def _paths(folder: Path, name: str) -> dict[str, Path]:
    stem = name.replace(" ", "-").replace("/", "-")
    return {p: folder / f"{stem}.{p}.onnx" for p in ("fp32", "int8")}


def _write(clip: Clip, folder: Path, name: str) -> None:
    """The files of a variant; those that an earlier attempt has left are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = _paths(folder, name)
    if not paths["int8"].exists():
        graph = portable.graph(replace(clip), "image", 1, portable.Config().opset)
        portable.save(graph, paths["fp32"])
        portable.save(_int8.rewrite(graph), paths["int8"])
    shape = (1, 3, *clip.preprocess.size)
    reason = _forked.call(write_openvino, (paths["fp32"], shape), folder / "nncf.log")
    if reason:  # NNCF takes several times the file's memory
        raise PocketclipError(f"{clip.name}, {name}: NNCF ended with {reason}")


def _opened(clip: Clip, folder: Path, name: str, float_too: bool) -> list[tuple[str, str, Call]]:
    """(target, precision, call) of a variant in every runtime that is installed here."""
    paths = _paths(folder, name)
    found = [
        ("onnxruntime", precision, onnxruntime(path))
        for precision, path in paths.items()
        if float_too or precision == "int8"
    ]
    return found + openvino(paths["fp32"], float_too)


def onnxruntime(path: Path) -> Call:
    session = portable._session(path, "cpu", 1)
    return lambda array: session.run(None, {"pixels": array})[0]


def _int8_beside(path: Path) -> Path:
    return path.with_name(path.name.replace(".fp32.onnx", ".int8.xml"))


def write_openvino(path: Path, shape: tuple[int, ...]) -> None:
    """NNCF's int8, ranges from noise: only its time is of interest."""
    try:
        import nncf
        import openvino as ov
    except ImportError:
        return
    if _int8_beside(path).exists():
        return
    noise = [np.random.default_rng(n).normal(size=shape) for n in range(2)]
    samples = nncf.Dataset([row.astype(np.float32) for row in noise])
    model = ov.Core().read_model(path)
    made = nncf.quantize(
        model,
        samples,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=2,
        ignored_scope=nncf.IgnoredScope(names=_integers.floating(model)),
    )
    ov.save_model(made, _int8_beside(path), compress_to_fp16=False)


def openvino(path: Path, float_too: bool) -> list[tuple[str, str, Call]]:
    """The float32 file and the int8 one beside it."""
    if not _int8_beside(path).exists():
        return []
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}

    def call(file: Path) -> Call:
        model = core.read_model(file)
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda array: request.infer({0: array})[0].copy()

    floats = [("openvino", "fp32", call(path))] if float_too else []
    return [*floats, ("openvino", "int8", call(_int8_beside(path)))]
