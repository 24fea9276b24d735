"""The real path, in small: a recipe through real stages, exporters, evaluation and benchmark."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_clip, tiny_data

import compress.clip
from compress import cli, plugin, runner
from compress import recipe as recipes
from compress.errors import PocketclipError

Damage = Callable[[Path], str]
RECIPE = """
name: tiny
model: model
device: cpu
data:
  train: [pictures]
  evaluate: {val: [pictures]}
  classes: classes.json
  templates: ["{}", "a {}"]
  image_size: 32
stages:
  - inherit: {vision: {width: 16, layers: 1}, text: {width: 16, layers: 1}}
  - distill: {steps: 4, batch_size: 4, checkpoint_every: 50, views: 2}
export:
  - onnx: {}
  - onnxruntime: {precision: int8, min_cosine: 0.9}
bench:
  {processes: 1, rounds: 3, round_seconds: 0.02, min_queries: 10, warmup_seconds: 0.05,
   patience_seconds: 0, roofline: false}
"""


def write_recipe(folder: Path) -> Path:
    """A recipe over a tiny saved model and tiny data, with the stages and exporters that ship."""
    tiny_data(folder)
    compress.clip.save(tiny_clip(), folder / "model")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run that is done, beside its folder `run`; not to be changed."""
    path = write_recipe(tmp_path_factory.mktemp("finished"))
    run(path)
    return path


def run(recipe: Path, *overrides: str) -> list[str]:
    said: list[str] = []
    runner.run(recipes.load(recipe, list(overrides)), recipe.parent / "run", said.append)
    return said


def test_recipe_becomes_bundles_figures_and_a_report(finished: Path) -> None:
    out = finished.parent / "run"
    rows = json.loads((out / "summary.json").read_text())["rows"]
    found = {(row["artifact"], row["target"], row["precision"], row["tower"]) for row in rows}
    assert ("teacher", "onnxruntime", "fp32", "image") in found
    assert ("student", "onnx", "fp32", "text") in found
    assert ("student", "onnxruntime", "int8", "image") in found
    teacher, student = (
        compress.clip.load(out / folder).model.image for folder in ("teacher", "01-distill")
    )
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )
    assert (out / "report.html").read_text().startswith("<!")
    for target in ("onnx", "onnxruntime-int8"):
        bundle = json.loads((out / "export" / target / "bundle.json").read_text())
        assert [step["step"] for step in bundle["provenance"]] == ["inherit", "distill"]
    assert run(finished)[-1].startswith("nothing to do")


def test_exported_file_equals_the_model_of_the_last_stage(finished: Path) -> None:
    out = finished.parent / "run"
    clip = compress.clip.load(out / "01-distill")
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exported = plugin.find(plugin.EXPORTERS, "onnx").load(out / "export" / "onnx")
    expected = compress.clip.TorchEncoder(clip).encode_image(pixels)
    assert torch.allclose(exported.encode_image(pixels), expected, atol=1e-5)


def test_eval_reads_a_bundle_by_its_own_contracts(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = finished.parent / "run" / "export" / "onnx"
    cli.evaluate(str(bundle), finished)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {row[1]: float(row[2]) for row in table if row and row[0] == "val"}
    summary = json.loads((finished.parent / "run" / "summary.json").read_text())
    [row] = [r for r in summary["rows"] if r["target"] == "onnx" and r["tower"] == "image"]
    assert printed["top1"] == pytest.approx(row["top1"], abs=1e-4)


def truncate_shard(folder: Path) -> str:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for path in sorted((folder / "pictures").iterdir()):
            tar.add(path, path.name)
    content = (folder / "shard.tar").read_bytes()
    (folder / "shard.tar").write_bytes(content[: len(content) // 2])
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("train: [pictures]", "train: [shard.tar]"))
    return r"shard\.tar"


def corrupt_image(folder: Path) -> str:
    path = folder / "pictures" / "red-bar.png"
    path.write_bytes(path.read_bytes()[:60])
    return r"red-bar\.png"


def reshape_weights(folder: Path) -> str:
    path = folder / "model" / "model.safetensors"
    state = load_file(path)
    state["image.projection.weight"] = torch.zeros(3, 32)
    save_file(state, path)
    return r"image\.projection\.weight has shape \(3, 32\), the model needs \(16, 32\)"


def poison_weights(folder: Path) -> str:
    path = folder / "model" / "model.safetensors"
    state = load_file(path)
    state["text.projection.weight"][0, 0] = float("nan")
    save_file(state, path)
    return "finite|NaN|nan"


@pytest.mark.parametrize("damage", [truncate_shard, corrupt_image, reshape_weights, poison_weights])
def test_damaged_input_is_one_message(recipe_file: Path, damage: Damage) -> None:
    message = damage(recipe_file.parent)
    with pytest.raises(PocketclipError, match=message):
        run(recipe_file)
    out = recipe_file.parent / "run"
    assert not (out / "summary.json").exists()
    assert not list(out.rglob(".partial-*"))
    assert not (out / "01-distill" / "model.json").exists()
