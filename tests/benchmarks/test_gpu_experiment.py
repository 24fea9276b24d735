"""The experiment on GPUs, as far as it can be seen without one."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from benchmarks.experiments import gpu
from export import Unavailable


def test_a_bundle_is_told_by_its_cosine_and_a_refusal_by_its_words(tmp_path: Path) -> None:
    found = gpu.written("onnx", tiny_clip(), {}, tmp_path / "onnx")
    assert set(found) == {"image", "text"}
    assert all(row["executed"] and row["worst_cosine"] > 0.9999 for row in found.values())
    assert "worst_cosine_simulated" not in found["image"]
    refused = gpu.written("onnx", tiny_clip(), {"min_cosine": 1.0}, tmp_path / "strict")
    assert all(not row["passed"] and "cosine" in row["reason"] for row in refused.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--quick"])
    monkeypatch.setattr(gpu, "QUICK", tmp_path / "gpu.json")
    with pytest.raises(Unavailable, match="no CUDA device"):
        gpu.main()
    assert not (tmp_path / "gpu.json").exists()
