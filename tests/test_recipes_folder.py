"""Every recipe that ships is free of mistakes and begins with the command that runs it.

Those in recipes/published need data that does not ship: they are checked, planned and run for two
steps with tiny data and models in place of theirs, and everything else as published.
"""

import io
import json
import math
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_clip, tiny_data

import compress.clip
from compress import recipe as recipes
from compress import runner
from compress.data import datacompdr
from compress.data.datacompdr import Record

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PUBLISHED = [path for path in RECIPES if path.parent.name == "published"]
INHERIT = {"vision": {"width": 24, "layers": 2}, "text": {"width": 24, "layers": 1}}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in RECIPES if p not in PUBLISHED], ids=named)
def test_recipe_has_no_mistakes(path: Path) -> None:
    assert recipes.load(path).name


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe_begins_with_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("#") and f"pocketclip run {path.relative_to(ROOT)}" in first


def shards(folder: Path) -> None:
    """One tar of DataCompDR's layout, with pictures and captions joined, for any of the recipes."""

    def unit(num: int) -> torch.Tensor:
        vectors = [torch.nn.functional.normalize(torch.randn(num, 768), dim=-1) for _ in "ab"]
        return torch.cat(vectors, dim=1)

    records = []
    for n in range(8):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (30 * n, 90, 200)).save(buffer, "PNG")
        entries = [[[0, 0, 30, 30], [[6, 0.27]]]]
        texts = {"syn_text": ["a thing", "some thing"]}
        records.append(
            Record(f"u{n}", entries, unit(1), unit(1), {"syn_text": unit(2)}, texts,
                   image=buffer.getvalue(), caption=f"thing {n}")
        )  # fmt: skip
    datacompdr.write(folder / "dr/0.tar", records, bfloat16=True)
    (folder / "plain").mkdir()
    with tarfile.open(folder / "plain/0.tar", "w") as tar:
        for record in records:
            for suffix, content in (("png", record.image), ("txt", record.caption.encode())):
                info = tarfile.TarInfo(f"{record.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def tiny_version(path: Path, folder: Path) -> list[str]:
    """What is set differently so that a recipe runs on tiny data in seconds."""
    raw = yaml.safe_load(path.read_text())
    given = {"model": str(folder / "model"), "data.evaluate": {"val": [str(folder / "pictures")]}}
    if "classes" in raw["data"]:
        given["data.train"] = [str(folder / "pictures")]
        given |= {"data.classes": str(folder / "classes.json"), "data.image_size": 32}
    else:
        layout = "dr" if "mobileclip" in path.name else "plain"
        given["data.train"] = [str(folder / layout / "0.tar")]
    for index, stage in enumerate(raw["stages"]):
        [(name, settings)] = stage.items()
        if name == "inherit":
            small = {tower: INHERIT[tower] for tower in INHERIT}
            given |= {f"stages[{index}].{tower}": sizes for tower, sizes in small.items()}
            continue
        short = {"steps": 2, "batch_size": 4, "precision": "fp32", "phases": []}
        if "languages" in settings:
            short["languages"] = ["en"]
        if "inherit" in settings:
            short["inherit"] = settings["inherit"] | {"prune_step": 1}
        if "stream" in settings:
            short["stream"] = settings["stream"] | {"samples_per_shard": 8, "threads": 1}
        given |= {f"stages[{index}].{key}": value for key, value in short.items()}
    return [f"{place}={json.dumps(value)}" for place, value in given.items()]


@pytest.mark.parametrize("path", PUBLISHED, ids=named)
def test_published_recipe_plans_and_takes_two_real_steps(path: Path, tmp_path: Path) -> None:
    tiny_data(tmp_path)
    shards(tmp_path)
    compress.clip.save(tiny_clip(layers=3), tmp_path / "model")
    overrides = tiny_version(path, tmp_path)
    loaded = recipes.load(path, [*overrides, "export=[]", "evaluate.resamples=100"])
    out = tmp_path / "out"
    planned = [row.folder for row in runner.plan(loaded, out)]
    stages = [f"{n:02d}-{step.name}" for n, step in enumerate(loaded.stages)]
    assert planned == ["teacher", *stages, "bench"] and recipes.load(path, overrides).export
    runner.run(loaded, out, lambda line: None)
    trained = [(a, b) for a, b in pairwise(planned) if b.endswith("distill")]
    assert trained
    for before, after in trained:
        log = [json.loads(line) for line in (out / after / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == [0, 1]
        assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
        models = [compress.clip.load(out / name).model for name in (before, after)]
        one, two = (model.state_dict()["text.token.weight"] for model in models)
        assert one.shape != two.shape or not torch.equal(one, two)
