"""The ladder stops at the first rung that keeps its gates, and says why it left the others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress import fallback
from compress.clip import Clip, TorchEncoder
from compress.fallback import Gates
from compress.scheme import Scheme
from compress.stages import quantize
from compress.work import Work


class Files:
    """An exporter whose files are torch models, so that the ladder alone is tried."""

    clips: dict[str, Clip] = {}  # noqa: RUF012

    @staticmethod
    def Config(**settings: object) -> None:
        return None

    @classmethod
    def write(cls, clip: Clip, cfg: object, out: Path) -> None:
        cls.clips[str(out)] = clip

    @classmethod
    def load(cls, folder: Path, device: str, threads: int) -> TorchEncoder:
        return TorchEncoder(cls.clips[str(folder)])


@pytest.fixture(autouse=True)
def torch_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback.plugin, "find", lambda package, name: Files)


def test_gates_that_hold_take_the_first_rung(work: Work, tmp_path: Path) -> None:
    gates = Gates(max_drop=1.0, min_speedup=0.0, num_images=8)
    made = quantize.run(work, quantize.Config(fallback=gates), tmp_path).clip
    (step,) = json.loads((tmp_path / "fallback.json").read_text())
    assert step["rung"] == fallback.LADDER[0][0] and step["reason"] is None
    scheme = made.model.config.scheme
    assert scheme is not None and scheme.label == "w8a8"
    assert {layer.equalized for layer in scheme.layers.values()} == {"none"}


def test_each_step_down_has_its_reason(work: Work, tmp_path: Path) -> None:
    gates = Gates(max_drop=1.0, min_speedup=1e6, num_images=8, rounds=1)
    made = quantize.run(work, quantize.Config(fallback=gates), tmp_path).clip
    steps = json.loads((tmp_path / "fallback.json").read_text())
    names = [name for name, _ in fallback.LADDER]
    assert [s["rung"] for s in steps] == [*names, "half precision", "float"]
    assert all("1000000.00 needed" in s["reason"] for s in steps[:-1])
    assert steps[-1]["reason"] is None
    assert made.model.config.scheme == Scheme(layers={}, rest="float32")


def test_half_precision_is_the_last_rung_before_float(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tiny_clip(seed=5)
    with torch.no_grad():
        broken.model.image.projection.weight.zero_()
    knows = lambda encoder, *_: float(encoder.model.image.projection.weight.any())  # noqa: E731
    monkeypatch.setattr(fallback, "top1", knows)
    gates = Gates(max_drop=0.0, min_speedup=0.0, num_images=8, rounds=1)
    made, steps = fallback.descend(work, lambda _: broken, gates)
    assert len(steps) == len(fallback.LADDER) + 1
    assert steps[-1].rung == fallback.HALF and steps[-1].reason is None
    assert made.model.config.scheme == Scheme(layers={}, rest="float16")


def test_a_rung_that_loses_too_much_is_left(work: Work) -> None:
    broken = tiny_clip(seed=5)
    with torch.no_grad():
        broken.model.image.projection.weight.zero_()

    def make(settings: dict[str, object]) -> Clip:
        return broken if settings.get("equalize") == "none" else work.clip

    gates = Gates(max_drop=0.0, min_speedup=0.0, num_images=8, rounds=1)
    learnt = replace(work, clip=work.clip)
    pixels, tokens = fallback.held_back(learnt, 8)
    assert fallback.top1(TorchEncoder(broken), pixels, tokens) == 0.0  # ties are lost
    clip, steps = fallback.descend(learnt, make, gates)
    base = fallback.top1(TorchEncoder(work.clip), pixels, tokens)
    if base > 0:
        assert steps[0].reason is not None and "of top-1" in steps[0].reason
    assert clip is (work.clip if base > 0 else broken)


def test_verdicts_name_figures() -> None:
    gates = Gates(max_drop=0.01, min_speedup=1.2, num_images=8)
    assert fallback.verdict(0.005, 1.3, gates) is None
    assert fallback.verdict(0.02, 1.3, gates) == "loses 2.0% of top-1, 1.0% allowed"
    assert fallback.verdict(0.0, 1.1, gates) == "1.10 times the float files' speed, 1.20 needed"
