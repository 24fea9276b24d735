"""An NVIDIA GPU: torch, CUDA graphs and TensorRT on the same towers, proved and timed.

    python -m benchmarks.experiments.gpu            a few minutes; needs a GPU
    python -m benchmarks.experiments.gpu --quick    the embedded teacher, short rounds

Parity: one engine for each precision and batch, its embeddings against the torch model's; where
TensorRT builds or runs nothing here, its own words. Latency: single queries by the protocol of
`benchmarks/latency.py` on the hosts cuda and cuda:graph. Batches: milliseconds of one call of the
torch towers by CUDA events, in float32 and in half precision. Models of open_clip have random
weights, on which neither depends.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import bundles, latency, machine
from benchmarks.experiments.target_sources import RECIPE, ROOT, SEED, SOURCES, TEACHER
from benchmarks.hosts import cuda
from benchmarks.statistics import summarise
from benchmarks.timing import Artifact, Config
from compress import plugin
from compress import recipe as recipes
from compress.atomic import write_json
from compress.clip import Clip
from compress.errors import PocketclipError
from export import Unavailable

RESULTS = ROOT / "benchmarks/results/gpu.json"
QUICK = ROOT / "runs/gpu-quick/gpu.json"
MODELS = (TEACHER, "ViT-B/16", "ViT-B/32")
ENGINES = (("fp16", 1), ("fp16", 8), ("int8", 1), ("int8", 8), ("fp8", 1))
CALIBRATION = 32
BATCHES = (1, 8, 64, 256)
CALLS, WARMUP = 30, 5
CFG = Config(processes=1, rounds=8, min_queries=100, patience_seconds=5, max_seconds=60)
SHORT = Config(processes=1, rounds=2, min_queries=10, patience_seconds=0)

Row = dict[str, Any]


def engines(name: str, clip: Clip, place: Path) -> list[Row]:
    """A row for each engine and tower: how near it is to torch, or why there is none."""
    rows = []
    for precision, batch in ENGINES:
        about: Row = {"part": "parity", "model": name, "target": "tensorrt"}
        about |= {"precision": precision, "batch": batch}
        settings: Row = {"precision": precision, "batch": batch, "calibration": CALIBRATION}
        found = written("tensorrt", clip, settings, place / f"tensorrt-{precision}-{batch}")
        rows += [about | {"tower": tower, **figures} for tower, figures in found.items()]
        print(name, precision, batch, found, flush=True)
    return rows


def written(target: str, clip: Clip, settings: Row, out: Path) -> dict[str, Row]:
    """Tower -> whether its file was executed here, and its worst cosine to the torch model; or the
    reason."""
    exporter = plugin.find(plugin.EXPORTERS, target)
    try:
        exporter.write(clip, exporter.Config.model_validate(settings), out)
    except (PocketclipError, Unavailable) as reason:
        return {tower: {"passed": False, "reason": str(reason)[:300]} for tower in bundles.TOWERS}
    about = json.loads((out / "bundle.json").read_text())
    common = {"passed": True, "executed": about["executed"], "reason": about.get("unavailable")}
    key = "worst_cosine" if about["executed"] else "worst_cosine_simulated"
    return {t: {**common, key: about["parity"][t]["worst_cosine"]} for t in bundles.TOWERS}


def single_queries(name: str, clip: Clip, place: Path, cfg: Config) -> list[Row]:
    """Latency of torch, torch's graphs and every engine for one query, interleaved."""
    written("open_clip", clip, {"precision": "fp32"}, place / "open_clip-fp32-1")
    folders = sorted(folder.parent for folder in place.glob("*-1/bundle.json"))
    rows: list[Row] = []
    for tower in bundles.TOWERS:
        artifacts = [
            Artifact(b.target, b.folder, tower, 1, b.queries(tower), host=host)
            for b in map(bundles.read, folders)
            for host in (("cuda", "cuda:graph") if b.target == "open_clip" else ("cuda",))
        ]
        timings, hosts = latency.measure(artifacts, cfg)
        for artifact, timing in zip(artifacts, timings):
            target, precision, _ = artifact.folder.name.split("-")
            row = {"part": "latency", "model": name, "tower": tower, "target": target}
            row |= {"precision": precision, "host": artifact.host, **summarise(timing, cfg)}
            row.pop("placement", None)
            rows.append(row | {"energy": hosts[artifact.host].get("energy")})
    return rows


@torch.no_grad()
def batches(name: str, clip: Clip, sizes: tuple[int, ...]) -> list[Row]:
    """Milliseconds of one call of each torch tower, by batch, in float32 and half precision."""
    model = clip.model.cuda().eval()
    config = clip.model.config
    side = config.vision.image_size
    rows: list[Row] = []
    for half in (False, True):
        for size in sizes:
            pixels = torch.randn(size, 3, side, side, device="cuda")
            tokens = torch.randint(1, 1000, (size, config.text.context_length), device="cuda")
            for tower, call in {
                "image": lambda pixels=pixels: model.image(pixels),
                "text": lambda tokens=tokens: model.text(tokens),
            }.items():
                with torch.autocast("cuda", torch.float16, enabled=half):
                    times = by_events(call)
                row = {"part": "batches", "model": name, "tower": tower, "batch": size}
                row |= {"precision": "fp16 autocast" if half else "fp32"}
                rows.append(row | {"p50_ms": float(np.median(times)), "calls": len(times)})
    model.cpu()
    return rows


def claims(rows: list[Row]) -> list[Row]:
    """None: the issue names no figure for GPUs."""
    return []


def by_events(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of each call between CUDA events, warmed up."""
    for _ in range(WARMUP):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="writes to runs/gpu-quick")
    given = parser.parse_args()
    path = QUICK if given.quick else RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {
        "command": shlex.join(["python", "-m", "benchmarks.experiments.gpu", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": cuda.describe(),
        "versions": machine.versions(),
        "seeds": [SEED],
    }
    rows: list[Row] = []
    for name in MODELS[:1] if given.quick else MODELS:
        torch.manual_seed(SEED)
        clip = replace(SOURCES[name](), data=recipes.load(RECIPE).shards())
        with tempfile.TemporaryDirectory() as folder:
            rows += engines(name, clip, Path(folder))
            rows += single_queries(name, clip, Path(folder), SHORT if given.quick else CFG)
        rows += batches(name, clip, BATCHES[:2] if given.quick else BATCHES)
        write_json(path, {**common, "rows": rows, "claims": claims(rows)})


if __name__ == "__main__":
    main()
