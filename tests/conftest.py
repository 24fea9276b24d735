"""Fixtures over the tiny objects of tiny.py."""

from pathlib import Path

import pytest
import torch
import toy
from tiny import tiny_clip, tiny_data, tiny_work

import compress.clip
from compress import plugin
from compress.clip import Clip
from compress.work import Data, Work

RECIPE = """\
name: small
model: model
data:
  train: [pictures]
  evaluate: {val: [pictures]}
  classes: classes.json
  image_size: 32
stages:
  - nudge: {amount: 0.25, noise: 0.1}
  - count: {steps: 3}
export:
  - onnxruntime: {precision: int8}
"""


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    """Results of a test depend on nothing but the test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def clip() -> Clip:
    return tiny_clip()


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return tiny_data(tmp_path)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return tiny_work(tmp_path)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy stages, exporters and benchmark in place of the real ones."""
    monkeypatch.setattr(plugin, "STAGES", toy.STAGES)
    monkeypatch.setattr(plugin, "EXPORTERS", toy.EXPORTERS)
    monkeypatch.setattr("benchmarks.run.bench", toy.bench)
    monkeypatch.setattr("benchmarks.report.write", toy.write_report)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe over a tiny saved model and tiny data, with two toy stages and one export."""
    tiny_data(tmp_path)
    compress.clip.save(tiny_clip(), tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path
