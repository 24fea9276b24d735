"""What quantization costs: executed files of each runtime, and simulated research quantizers.

    python -m benchmarks.experiments.quantization            about two hours on two idle cores
    python -m benchmarks.experiments.quantization --quick    a few minutes, student only, 1 seed
    python -m benchmarks.experiments.quantization --only executed-w8a8-teacher-0 float-teacher
                                                             runs arms whose names begin so
    python -m benchmarks.experiments.quantization --student runs/quickstart
                                                             takes the student of a finished run

Every row has `executed`: true where a runtime computed it, false where torch simulated it; no claim
mixes them. Classes are asked for by their names alone, and each image by its first caption, in
float as in quantized models. Arms that are done are kept in runs/quantization under the hash of the
weights they are of, so a stopped experiment continues, and one in a fresh clone with what the
committed results have of the same weights; the results hold every arm that is kept.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bundles, machine
from benchmarks.experiments import _quantization_arms as arms
from benchmarks.experiments import _quantization_latency as latency
from benchmarks.experiments._quantization_bench import (
    ROOT,
    Bench,
    Simulation,
    digest,
    margins,
    near_ties,
)
from benchmarks.experiments._quantization_claims import claims as claims
from benchmarks.experiments._quantization_kept import Rows, carried, once, rows_of, take_over
from compress import calibrate, plugin
from compress.atomic import write_json
from compress.clip import Clip
from compress.evaluate import text_to_image_ranks
from compress.nn import vectors
from compress.stages import quantize
from compress.twin import float_twin
from compress.work import Data, Work
from export import Unavailable

RUNS = ROOT / "runs/quantization"
RESULTS = ROOT / "benchmarks/results/quantization.json"
QUICK = ROOT / "runs/quantization-quick"
SEEDS = (0, 1, 2)


class Job(NamedTuple):
    """An arm of the experiment."""

    name: str
    model: str | None
    make: Callable[[], Rows]


def float_rows(bench: Bench, model: str) -> Rows:
    figures = bench.figures(Simulation(bench.clip(model)), model)
    row = {"model": model, "arm": "float", "seed": 0, "executed": False, **figures}
    return [row | near_ties(margins(bench.floats[model]))]


def executed_rows(bench: Bench, model: str, arm: str, seed: int, runtime: str) -> Rows:
    """A quantized model in a runtime that realises schemes."""
    made = bench.quantized(model, arms.EXECUTED[arm], seed)
    row = {"model": model, "arm": arm, "seed": seed, "executed": True, "runtime": runtime}
    row["cpu"] = machine.short()
    exporter = plugin.find(plugin.EXPORTERS, runtime.partition("-")[0])
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "bundle"
        try:
            settings = exporter.Config(**arms.RUNTIMES[runtime], min_cosine=-1.0)
            exporter.write(made, settings, out)
            encoder = exporter.load(out, "cpu", 1)
        except Unavailable as reason:
            return [row | {"executed": False, "unavailable": str(reason)}]
        bundle = bundles.read(out)
        sizes = {f"{tower}_bytes": bundle.size_bytes(tower) for tower in ("image", "text")}
        parity = min(bundle.about["parity"][tower]["worst_cosine"] for tower in ("image", "text"))
        figures = bench.figures(encoder, model)
    return [row | figures | sizes | {"worst_cosine_to_simulation": parity}]


def fixed_prompt_rows(bench: Bench, model: str, seed: int) -> Rows:
    """The simulated image tower alone, against prompts embedded once in float."""
    made = bench.quantized(model, arms.EXECUTED[arms.FIXED_PROMPTS], seed)
    figures = bench.figures(Simulation(made), model, texts=False)
    row = {"model": model, "arm": "w8a8, texts in float", "seed": seed, "executed": False}
    return [row | figures]


def simulated_rows(bench: Bench, model: str, arm: str, seed: int) -> Rows:
    """One research setting of the image tower, against float texts."""
    made = bench.quantized(model, {**arms.SIMULATED[arm], "towers": ("image",)}, seed)
    figures = bench.figures(Simulation(made), model, texts=False)
    return [{"model": model, "arm": arm, "seed": seed, "executed": False, **figures}]


def embedding_rows(bench: Bench, model: str) -> Rows:
    """Index bytes against retrieval: integer and binary vectors, and fewer dimensions, of the float
    tower and of the rounded one.

    Dimensions are cut behind the towers, which is what folding the cut into them computes.
    """
    clip = bench.clip(model)
    train = calibration_vectors(clip, bench.data)
    rows = []
    for tower, made in (("float", clip), ("w8a8", bench.quantized(model, {}, 0))):
        own = bench.embeddings(Simulation(made), model)
        for how, directions in cuts(*train).items():
            index, queries = (_cut(own, directions) for own in (own.images, own.captions))
            for kind in arms.VECTORS:
                codec = vectors.fit(kind, _cut(train[0].numpy(), directions))
                stored = F.normalize(codec.stored(index), dim=-1).numpy()
                asked = codec.query(queries).numpy()
                ranks = text_to_image_ranks(replace(own, images=stored, captions=asked))
                row = {"model": model, "arm": f"vectors {kind}, {how}, {tower} towers", "seed": 0}
                figures = {"text_to_image_r1": float((ranks < 1).mean())}
                row |= {"executed": False, "bytes_per_vector": codec.num_bytes()}
                rows.append(row | figures)
    return rows


def cuts(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Ways to fewer dimensions: name -> directions [E, K], from training vectors [N, E]."""
    width = images.shape[1]
    found = {f"{width} dimensions": torch.eye(width)}
    for dim in (width // 2, width // 4):
        found[f"{dim} by pca"] = vectors.pca(images, texts, dim)
        found[f"first {dim}"] = torch.eye(width)[:, :dim]
    return found


def _cut(rows: Any, directions: Tensor) -> Tensor:
    return F.normalize(torch.from_numpy(rows) @ directions, dim=-1)


@torch.no_grad()
def calibration_vectors(clip: Clip, data: Data) -> tuple[Tensor, Tensor]:
    pairs = calibrate.draw(clip, data, 512, 0)
    return calibrate.embed(clip.model, pairs)


@torch.no_grad()
def outlier_rows(bench: Bench, model: str) -> Rows:
    """Models with channels, neurons or a token that reach far: cosines to the same in float."""
    pixels = bench.pixels(model)[:: arms.OUTLIER_STRIDE]
    rows = []
    for place, spoil in arms.SPOILT.items():
        clip = float_twin(bench.clip(model))
        spoilt = clip.with_model(spoil(clip.model), {"step": "outliers"})
        wanted = Simulation(spoilt).encode_image(pixels)
        for name, settings in arms.OUTLIERS.items():
            work = Work(spoilt, spoilt, bench.data)
            with tempfile.TemporaryDirectory() as out:
                cfg = quantize.Config(**settings, towers=("image",))
                made = quantize.run(work, cfg, Path(out)).clip
            found = Simulation(made).encode_image(pixels)
            row = {"model": model, "arm": f"outliers in {place}, {name}", "seed": 0}
            cosine = float((found * wanted).sum(1).mean())
            rows.append(row | {"executed": False, "image_cosine": cosine})
    return rows


def jobs(bench: Bench, models: tuple[str, ...], seeds: tuple[int, ...]) -> list[Job]:
    """Every arm, the cheap and telling ones first."""
    found: list[Job] = []
    for model in models:

        def add(name: str, measure: Callable[..., Rows], *rest: Any, model: str = model) -> None:
            name = name.replace(" ", "_").replace(",", "")
            found.append(Job(name, model, partial(measure, bench, model, *rest)))

        add(f"float-{model}", float_rows)
        for arm, seed in product(arms.EXECUTED, seeds):
            for runtime in arms.runtimes(arm):
                once_only = arm in arms.UNCALIBRATED or runtime in arms.SHOWN_ONCE
                if once_only and seed != seeds[0]:
                    continue
                add(f"executed-{arm}-{model}-{seed}-{runtime}", executed_rows, arm, seed, runtime)
            if arm == arms.FIXED_PROMPTS:
                add(f"prompts-{model}-{seed}", fixed_prompt_rows, seed)
        add(f"vectors-{model}", embedding_rows)
        add(f"outliers-{model}", outlier_rows)
        for arm, seed in product(arms.SIMULATED, seeds):
            add(f"simulated-{arm}-{model}-{seed}", simulated_rows, arm, seed)
    for name in latency.MACS:
        timed = partial(latency.rows, name, bench.folder / f"files-{name}")
        found.append(Job(f"latency-{name}", None, timed))
    return found


def chosen(every: list[Job], starts: list[str]) -> list[Job]:
    """The arms whose names begin so, in the order of the beginnings."""
    return list(
        dict.fromkeys(job for start in starts for job in every if job.name.startswith(start))
    )


def conditions(bench: Bench, models: tuple[str, ...]) -> dict[str, Any]:
    """What figures depend on: the stage's version, the weights that are there (model -> sha256),
    and the machine."""
    there = [model for model in models if bench.weights(model).exists()]
    return {
        "quantize_version": quantize.VERSION,
        "machine": machine.describe(),
        "weights": {model: digest(bench.weights(model)) for model in there},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"writes into {QUICK.name}")
    parser.add_argument("--only", nargs="+", default=[""], help="arms whose names begin so")
    parser.add_argument("--student", type=Path, help="folder of a finished quickstart run")
    given = parser.parse_args()
    folder = QUICK if given.quick else RUNS
    models, seeds = (("student",), (0,)) if given.quick else (("teacher", "student"), SEEDS)
    bench = Bench(folder, given.quick, given.student)
    every = [job for job in jobs(bench, models, seeds) if job.model or not given.quick]
    files = {job.name: (job.model, bench.kept(job.name, job.model)) for job in every}
    if not given.quick:
        take_over(RESULTS, files, conditions(bench, models))
    for job in chosen(every, given.only):
        if job.model:
            bench.clip(job.model)
        once(bench.kept(job.name, job.model), job.make)
    rows = [row for job in every for row in rows_of(job.name, bench.kept(job.name, job.model))]
    stand = conditions(bench, models)
    measured = {row["job"] for row in rows}
    away: dict[str, str] = {}
    if not given.quick:
        others, away = carried(RESULTS, stand, measured)
        rows += others
    student = f" --student {given.student}" if given.student else ""
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.experiments.quantization{student}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": machine.versions(),
        **stand,
        "weights": stand["weights"] | away,
        "seeds": sorted({row["seed"] for row in rows}),
        "rows": rows,
        "claims": claims(rows),
    }
    write_json(folder / "quantization.json" if given.quick else RESULTS, result)
    for claim in result["claims"]:
        verdict = "holds" if claim["holds"] else "FALLS SHORT"
        print(f"{claim['name']}: {claim['value']:.4f} (goal {claim['goal']:g}) {verdict}")


if __name__ == "__main__":
    main()
