"""How cost grows with image size, batch, threads, model width and data, with fitted exponents.

    python -m benchmarks.experiments.scaling            about ten minutes on two cores
    python -m benchmarks.experiments.scaling --quick    two or three points a curve

Image towers with random weights, exported to ONNX Runtime float32; all points of a curve are timed
against each other, interleaved. `index_size` times a whole search, from a file's bytes to the ten
nearest. The exponent is the slope of log time over log size (least squares), its interval that of
resampled rounds of all points. Whole curves are kept in runs/scaling: remove them to measure again.
"""

import argparse
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import export.onnx
from benchmarks import latency, machine
from benchmarks.statistics import interval, resampled_medians, summarise
from benchmarks.timing import Artifact, Config, Timing
from compress.atomic import write_json
from compress.clip import Clip
from compress.model import ClipConfig, ClipModel, TextConfig, VisionConfig, initialise_
from compress.preprocess import Preprocess
from compress.tokenizer import Tokenizer, TokenizerContract

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/scaling.json"
TOKENIZER = ROOT / "recipes/emoji/data/tokenizer.json"
CURVES: dict[str, tuple[int, ...]] = {
    "image_size": (32, 64, 128, 224),
    "batch": (1, 2, 4, 8, 16),
    "width": (64, 128, 256, 512),
    "threads": (1, 2, 4, 8),
    "index_size": (3_000, 30_000, 300_000),
}
SEED = 0
CFG = Config(rounds=6, round_seconds=0.2, min_queries=30, max_interval=0.05, patience_seconds=20)
QUICK = Config(processes=1, rounds=3, round_seconds=0.05, min_queries=5, patience_seconds=0)


def clip(image_size: int = 64, width: int = 256) -> Clip:
    """A model of 6 layers with patches of 8 pixels and random weights."""
    shared: dict[str, Any] = {"width": width, "head_width": 32}
    shared |= {"heads": (max(1, width // 32),) * 6, "mlp_width": (4 * width,) * 6}
    text: dict[str, Any] = {"width": 64, "head_width": 32, "heads": (2,), "mlp_width": (64,)}
    config = ClipConfig(
        embed_dim=128,
        vision=VisionConfig(image_size=image_size, patch_size=8, **shared),
        text=TextConfig(vocab_size=4096, context_length=16, **text),
    )
    torch.manual_seed(SEED)
    model = ClipModel(config)
    initialise_(model)
    contract = TokenizerContract(
        lowercase=True, context_length=16, start_id=4094, end_id=4095, pad_id=0
    )
    preprocess = Preprocess(size=(image_size, image_size), mean=(0.5,) * 3, std=(0.5,) * 3)
    tokenizer = Tokenizer.load(TOKENIZER, contract)
    return Clip(model.eval(), preprocess, tokenizer, "scaling", "Apache-2.0")


def artifact(curve: str, size: int, place: Path) -> Artifact:
    """The point of a curve, exported if it is not there yet."""
    settings = {curve: size} if curve in ("image_size", "width") else {}
    batch = size if curve == "batch" else 1
    model = clip(**settings)
    side = model.preprocess.size[0]
    vision = model.model.config.vision
    assert isinstance(vision, VisionConfig)
    folder = place / f"size-{side}-width-{vision.width}-batch-{batch}"
    if not (folder / "bundle.json").exists():
        export.onnx.write(model, export.onnx.Config(batch=batch), folder)
    pixels = np.random.default_rng(SEED).random((4, 3, side, side), dtype=np.float32)
    threads = size if curve == "threads" else 1
    if curve == "index_size":
        return Artifact("onnx", folder, "image", threads, pixels, "search", index_size=size)
    return Artifact("onnx", folder, "image", threads, pixels)


def measured(curve: str, sizes: Sequence[int], cfg: Config, place: Path) -> list[dict[str, Any]]:
    """One row for each point, and one with the curve's exponent."""
    timings, hosts = latency.measure([artifact(curve, size, place) for size in sizes], cfg)
    rows = []
    for size, timing in zip(sizes, timings):
        figures = summarise(timing, cfg)
        keep = ("p50_ms", "p50_ms_ci95", "num_queries", "unavailable")
        rows.append({"curve": curve, "size": size} | {k: figures[k] for k in keep if k in figures})
    known = [(s, t) for s, t in zip(sizes, timings) if t.rounds and t.unavailable is None]
    busy = hosts["local"]["disturbance"].get("cores_busy")
    slope = exponent([s for s, _ in known], [t for _, t in known], cfg)
    return [*rows, {"curve": curve, "cores_busy": busy, **slope}]


def exponent(sizes: Sequence[int], timings: Sequence[Timing], cfg: Config) -> dict[str, Any]:
    """Least-squares slope of log time over log size, with the interval of resampled rounds."""
    if len(sizes) < 2:
        return {"exponent": None, "exponent_ci95": None}
    medians = [resampled_medians(t.rounds, cfg.resamples, cfg.seed) for t in timings]
    slopes = np.polyfit(np.log(sizes), np.log(np.stack(medians)), 1)[0]  # one a resample
    middle = [np.median(np.concatenate(t.rounds)) for t in timings]
    slope = float(np.polyfit(np.log(sizes), np.log(middle), 1)[0])
    return {"exponent": slope, "exponent_ci95": interval(slopes)}


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The issue asks for curves and sets no goal; what a shape must not be is checked instead."""
    found = []
    for curve, goal, better in (("image_size", 4.0, "lower"), ("threads", 0.0, "lower")):
        which = [i for i, row in enumerate(rows) if row["curve"] == curve and "exponent" in row]
        value = rows[which[0]]["exponent"] if which else None
        if value is not None:
            name = f"exponent of time over {curve.replace('_', ' ')}"
            entry = {"name": name, "value": value, "goal": goal, "unit": "exponent"}
            found.append({**entry, "better": better, "holds": bool(value <= goal), "rows": which})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="writes into runs/scaling-quick")
    quick = parser.parse_args().quick
    place = ROOT / "runs" / ("scaling-quick" if quick else "scaling")
    cores = len(machine.allowed_cores())
    rows = []
    for curve, sizes in CURVES.items():
        chosen = [s for s in sizes if curve != "threads" or s <= cores]
        chosen, path = chosen[:2] if quick else chosen, place / f"{curve}.json"
        if not path.exists():  # a stopped experiment goes on after the last whole curve
            write_json(path, measured(curve, chosen, QUICK if quick else CFG, place))
        rows += json.loads(path.read_text())
    result = {
        "command": "python -m benchmarks.experiments.scaling" + (" --quick" if quick else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe() | {"load": os.getloadavg()},
        "versions": machine.versions(),
        "seeds": [SEED],
        "rows": rows,
        "claims": claims(rows),
    }
    write_json(place / "scaling.json" if quick else RESULTS, result)
    for row in rows:
        if "exponent" in row:
            print(f"{row['curve']}: time ~ size^{row['exponent']}, 95 % {row['exponent_ci95']}")


if __name__ == "__main__":
    main()
