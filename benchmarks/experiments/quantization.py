"""What quantization costs: executed files of each runtime, and simulated research quantizers.

    python -m benchmarks.experiments.quantization            about 40 minutes on two idle cores
    python -m benchmarks.experiments.quantization --quick    a few minutes, student only, 1 seed
    python -m benchmarks.experiments.quantization --only executed-w8a8-teacher-0 float-teacher
                                                             arms whose names begin so, no others

Every row has `executed`: true where a runtime computed it, false where torch simulated it; no claim
mixes them. Classes are asked for by their names alone, and each image by its first caption, in
float as in quantized models. Arms that are done are kept in runs/quantization, so a stopped
experiment continues.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress.clip
from benchmarks import bundles, machine
from benchmarks.experiments import _quantization_arms as arms
from benchmarks.experiments._quantization_claims import claims as claims
from compress import plugin, recipe
from compress.atomic import write_json
from compress.batches import embed_images, embed_texts
from compress.clip import Clip, Encoder, TorchEncoder
from compress.embeddings import Config as Evaluation
from compress.embeddings import Embeddings, embed
from compress.evaluate import measure
from compress.nn import vectors
from compress.stages import quantize, reduce_embedding
from compress.twin import float_twin
from compress.work import Data, Work
from export import Unavailable

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
RUNS = ROOT / "runs/quantization"
RESULTS = ROOT / "benchmarks/results/quantization.json"
QUICK = ROOT / "runs/quantization-quick"
SPLIT = "held_out_style"
SEEDS = (0, 1, 2)
FIGURES = ("top1", "image_to_text_r1", "text_to_image_r1")


class Simulation(TorchEncoder):
    """A torch model that cuts texts behind their end, as is exact for causal towers."""

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        return embed_texts(self.model.text, tokens)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        return embed_images(self.model.image, pixels)


class Bench:
    """Models, data and figures of the experiment; everything slow is done once."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.evaluation = Evaluation(captions_per_image=1, resamples=200, splits=(SPLIT,))
        self.floats: dict[str, Embeddings] = {}
        self.made: tuple[Any, Clip] | None = None

    @cached_property
    def data(self) -> Data:
        return replace(recipe.load(RECIPE).shards(), templates=("{}",))

    @cached_property
    def teacher(self) -> Clip:
        return plugin.source("teacher", RECIPE.parent)

    @cached_property
    def student(self) -> Clip:
        """The quickstart's student, trained once."""
        run = self.folder / "student"
        if not (run / "01-distill/model.json").exists():
            command = [sys.executable, "-m", "compress", "run", str(RECIPE), "--out", str(run)]
            settings = ["export=[]", f"evaluate.splits=[{SPLIT}]"]
            settings += ["stages.distill.steps=100"] if self.quick else []
            done = subprocess.run(
                [*command, *(a for s in settings for a in ("--set", s))], cwd=ROOT
            )
            if done.returncode:
                sys.exit("training the student failed")
        return compress.clip.load(run / "01-distill")

    def clip(self, model: str) -> Clip:
        return self.teacher if model == "teacher" else self.student

    def figures(self, encoder: Encoder, model: str, texts: bool = True) -> dict[str, Any]:
        """Accuracy on the held-out style; without `texts` against the float model's texts."""
        clip = self.clip(model)
        if model not in self.floats:
            self.floats[model] = embed(Simulation(clip), clip, self.data, self.evaluation)[SPLIT]
        plain = self.floats[model]
        if texts:
            own = embed(encoder, clip, self.data, self.evaluation)[SPLIT]
        else:
            own = replace(plain, images=self._images(encoder, clip, plain))
        found = measure(own, self.evaluation)
        cosine = (own.images * plain.images).sum(1)
        words = (own.captions * plain.captions).sum(1)
        return {key: found[key] for key in FIGURES} | {
            "image_cosine": float(cosine.mean()),
            "text_cosine": float(words.mean()) if texts else None,
        }

    def _images(self, encoder: Encoder, clip: Clip, plain: Embeddings) -> Any:
        pairs = self.data.split(SPLIT)
        pixels = [clip.preprocess(pairs.image(int(i))) for i in plain.split.indices]
        return encoder.encode_image(torch.stack(pixels)).numpy()

    def quantized(self, model: str, settings: dict[str, Any], seed: int) -> Clip:
        """The quantized model; the last one is kept, as several runtimes follow each other."""
        key = (model, settings, seed)
        if self.made is None or self.made[0] != key:
            self.made = key, self._quantized(*key)
        return self.made[1]

    def _quantized(self, model: str, settings: dict[str, Any], seed: int) -> Clip:
        clip = self.clip(model)
        work = Work(clip, clip, self.data, seed=seed)
        with tempfile.TemporaryDirectory() as out:
            return quantize.run(work, quantize.Config.model_validate(settings), Path(out)).clip


def once(folder: Path, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of an arm, kept in a file."""
    path = folder / f"{name}.json"
    if not path.exists():
        rows = make()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, rows)
        print(name, *(_line(row) for row in rows), sep="\n  ", flush=True)
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def _line(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v
    )


def float_rows(bench: Bench, model: str) -> list[dict[str, Any]]:
    figures = bench.figures(Simulation(bench.clip(model)), model)
    return [{"model": model, "arm": "float", "seed": 0, "executed": False, **figures}]


def executed_rows(
    bench: Bench, model: str, arm: str, seed: int, runtime: str
) -> list[dict[str, Any]]:
    """A quantized model in a runtime that realises schemes."""
    made = bench.quantized(model, arms.EXECUTED[arm], seed)
    row = {"model": model, "arm": arm, "seed": seed, "executed": True, "runtime": runtime}
    exporter = plugin.find(plugin.EXPORTERS, runtime)
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


def fixed_prompt_rows(bench: Bench, model: str, seed: int) -> list[dict[str, Any]]:
    """The simulated image tower alone, against prompts embedded once in float."""
    made = bench.quantized(model, arms.EXECUTED[arms.FIXED_PROMPTS], seed)
    figures = bench.figures(Simulation(made), model, texts=False)
    row = {"model": model, "arm": "w8a8, texts in float", "seed": seed, "executed": False}
    return [row | figures]


def simulated_rows(bench: Bench, model: str, arm: str, seed: int) -> list[dict[str, Any]]:
    """One research setting of the image tower, against float texts."""
    made = bench.quantized(model, {**arms.SIMULATED[arm], "towers": ("image",)}, seed)
    figures = bench.figures(Simulation(made), model, texts=False)
    return [{"model": model, "arm": arm, "seed": seed, "executed": False, **figures}]


def embedding_rows(bench: Bench, model: str) -> list[dict[str, Any]]:
    """Index bytes against retrieval: integer and binary vectors, and fewer dimensions by PCA."""
    clip = bench.clip(model)
    rows = []
    width = clip.model.config.embed_dim
    for dim in (width, width // 2, width // 4):
        work = Work(clip, clip, bench.data)
        cut = clip
        if dim < width:
            cut = reduce_embedding.run(work, reduce_embedding.Config(dim=dim), bench.folder).clip
        own = embed(Simulation(cut), cut, bench.data, bench.evaluation)[SPLIT]
        train = calibration_vectors(cut, bench.data)
        for kind in arms.VECTORS:
            codec = vectors.fit(kind, train)
            stored = codec.stored(torch.from_numpy(own.images))
            queries = codec.query(torch.from_numpy(own.captions)).numpy()
            unit = torch.nn.functional.normalize(stored, dim=-1).numpy()
            found = measure(replace(own, images=unit, captions=queries), bench.evaluation)
            row = {"model": model, "arm": f"vectors {kind} x {dim}", "seed": 0, "executed": True}
            figures = {"text_to_image_r1": found["text_to_image_r1"]}
            rows.append(row | figures | {"bytes_per_vector": codec.num_bytes()})
    return rows


@torch.no_grad()
def calibration_vectors(clip: Clip, data: Data) -> Tensor:
    from compress import calibrate

    pairs = calibrate.draw(clip, data, 512, 0)
    return calibrate.embed(clip.model, pairs)[0]


def outlier_rows(bench: Bench, model: str) -> list[dict[str, Any]]:
    """A model whose norms give some channels 60 times the rest, undone by the weights."""
    clip = float_twin(bench.clip(model))
    spoilt = clip.with_model(arms.with_outliers(clip.model), {"step": "outliers"})
    rows = []
    for name, settings in arms.OUTLIERS.items():
        work = Work(spoilt, spoilt, bench.data)
        with tempfile.TemporaryDirectory() as out:
            made = quantize.run(work, quantize.Config.model_validate(settings), Path(out)).clip
        figures = bench.figures(Simulation(made), model, texts=False)
        row = {"model": model, "arm": f"outliers, {name}", "seed": 0, "executed": False}
        rows.append(row | figures)
    return rows


def jobs(bench: Bench, models: tuple[str, ...], seeds: tuple[int, ...]) -> list[Any]:
    """(name, function) of every arm, the cheap and telling ones first."""
    found: list[Any] = []
    for model in models:
        found.append((f"float-{model}", lambda m=model: float_rows(bench, m)))
        for arm, seed in product(arms.EXECUTED, seeds):
            for runtime in arms.runtimes(arm):
                make = partial(executed_rows, bench, model, arm, seed, runtime)
                found.append((f"executed-{arm}-{model}-{seed}-{runtime}", make))
            if arm == arms.FIXED_PROMPTS:
                make = partial(fixed_prompt_rows, bench, model, seed)
                found.append((f"prompts-{model}-{seed}", make))
        found.append((f"vectors-{model}", lambda m=model: embedding_rows(bench, m)))
        found.append((f"outliers-{model}", lambda m=model: outlier_rows(bench, m)))
        for arm, seed in product(arms.SIMULATED, seeds):
            make = partial(simulated_rows, bench, model, arm, seed)
            found.append((f"simulated-{arm}-{model}-{seed}", make))
    found.append(("latency", arms.latency_rows))
    return [(name.replace(" ", "_").replace(",", ""), make) for name, make in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"writes into {QUICK.name}")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="arms whose names begin so, in this order"
    )
    given = parser.parse_args()
    folder = QUICK if given.quick else RUNS
    models, seeds = (("student",), (0,)) if given.quick else (("teacher", "student"), SEEDS)
    rows = []
    every = jobs(Bench(folder, given.quick), models, seeds)
    chosen = {name: make for start in given.only for name, make in every if name.startswith(start)}
    for name, make in chosen.items():
        if not (given.quick and name == "latency"):
            rows += once(folder, name, make)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.experiments.quantization", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions(),
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
