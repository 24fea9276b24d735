"""A forecast follows from the shape of the models and the number of steps."""

from pathlib import Path

import pytest
from tiny import tiny_clip, tiny_config

import compress.clip
from compress import estimate, inspect
from compress import recipe as recipes
from compress.recipe import Recipe

RECIPE = """
name: small
model: model
stages:
  - inherit: {vision: {width: 16, layers: 1}, text: {width: 16, layers: 1}}
  - distill: {steps: 100, batch_size: 8}
export:
  - onnx: {}
"""


def load(folder: Path, *overrides: str) -> Recipe:
    compress.clip.save(tiny_clip(), folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    return recipes.load(folder / "recipe.yaml", list(overrides))


@pytest.fixture
def steady_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of one million multiply-adds a second."""
    monkeypatch.setattr(estimate, "multiply_adds_per_second", lambda: 1e6)


def test_multiply_adds_are_those_of_inspect() -> None:
    facts = inspect.describe(tiny_clip())
    expected = facts["image"]["num_macs"] + facts["text"]["num_macs"]
    assert estimate.multiply_adds(tiny_config()) == expected


@pytest.mark.usefixtures("steady_rate")
def test_training_is_forecast_from_the_shape_it_will_have(tmp_path: Path) -> None:
    found = estimate.forecast(load(tmp_path))
    student = tiny_config(layers=1, width=16)
    once = 800 / (1e6 * estimate.EFFICIENCY)
    own = 3 * estimate.multiply_adds(student)
    assert found["01-distill"] == pytest.approx(once * own)
    online = estimate.forecast(load(tmp_path, "stages.distill.teacher=online"))
    assert online["01-distill"] == pytest.approx(
        once * (own + estimate.multiply_adds(tiny_config()))
    )
    assert found["00-inherit"] == estimate.OPEN_SECONDS
    assert {"export/onnx", "teacher/onnxruntime-fp32", "bench"} <= set(found)


@pytest.mark.usefixtures("steady_rate")
def test_phases_of_low_resolution_cost_less(tmp_path: Path) -> None:
    half = "stages.distill.phases=[{until: 0.5, image_size: 16}]"
    before, after = estimate.forecast(load(tmp_path)), estimate.forecast(load(tmp_path, half))
    assert after["01-distill"] == pytest.approx((0.5 * 0.25 + 0.5) * before["01-distill"])


@pytest.mark.usefixtures("steady_rate")
def test_forecast_grows_with_steps_and_benchmark_rounds(tmp_path: Path) -> None:
    before = estimate.forecast(load(tmp_path))
    more = estimate.forecast(load(tmp_path, "stages.distill.steps=300", "bench.threads=[1, 2]"))
    assert more["01-distill"] == pytest.approx(3 * before["01-distill"])
    assert more["bench"] == pytest.approx(2 * before["bench"])


def test_model_by_name_is_not_opened(tmp_path: Path) -> None:
    found = estimate.forecast(load(tmp_path, "model=open_clip:ViT-B-32/openai"))
    assert "01-distill" not in found and "export/onnx" in found


def test_rate_is_measured_here() -> None:
    assert estimate.multiply_adds_per_second(size=64, seconds=0.02) > 1e6
