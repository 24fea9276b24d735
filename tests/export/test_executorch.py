"""ExecuTorch programs: written-out norms, what XNNPACK runs of them, and the thread pool."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip
from torch import nn

from export import Unavailable, _xnnpack

exporter = pytest.importorskip("export.executorch")


def test_written_out_norm_equals_torch() -> None:
    norm = nn.LayerNorm(24, eps=1e-5)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(3, 5, 24) * 4 + 2
    torch.testing.assert_close(_xnnpack.WrittenNorm(norm)(x), norm(x), rtol=0, atol=1e-5)


def test_every_norm_of_a_tower_is_written_out() -> None:
    tower = _xnnpack.write_out_(tiny_clip().model.image)
    kinds = [type(module) for module in tower.modules()]
    assert nn.LayerNorm not in kinds and kinds.count(_xnnpack.WrittenNorm) == 6


def test_nearly_all_is_delegated_in_few_pieces(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    exporter.write(tiny_clip(), exporter.Config(), tmp_path / "out")
    runtime = json.loads((tmp_path / "out" / "bundle.json").read_text())["runtime"]
    assert runtime["image"]["delegates"] <= 5
    assert runtime["image"]["delegated_share"] > 0.9
    assert runtime["text"]["delegates"] <= 4


def test_thread_pool_is_set_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    portable_lib = pytest.importorskip("executorch.extension.pybindings.portable_lib")
    exporter.set_threads(1)
    assert portable_lib._threadpool_get_thread_count() == 1
    monkeypatch.setattr(portable_lib, "_threadpool_get_thread_count", lambda: 7)
    with pytest.raises(Unavailable, match="7 threads, 1 were asked for"):
        exporter.set_threads(1)
