"""Towers whose tensors are bound: what is timed computes the very embedding that `encode` gives."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress import plugin
from export import _parity

pytestmark = pytest.mark.usefixtures("trace_once")
MODULES = {"openvino": "openvino", "executorch": "executorch", "litert": "litert_torch"}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "executorch", "litert"])
def test_bound_tower_gives_the_embedding_of_what_was_filled_in_last(
    target: str, tmp_path: Path
) -> None:
    pytest.importorskip(MODULES.get(target, "onnxruntime"))
    clip, exporter = tiny_clip(layers=1), plugin.find(plugin.EXPORTERS, target)
    exporter.write(clip, exporter.Config(precision="fp32"), tmp_path / target)
    encoder = exporter.load(tmp_path / target, threads=1)
    for tower, rows in zip(("image", "text"), _parity.probes(clip)):
        bound = encoder.bind(tower)
        for row in rows[:2]:
            bound.fill(row[None])
            bound.run()
        wanted = getattr(encoder, f"encode_{tower}")(rows[1:2])
        torch.testing.assert_close(torch.from_numpy(bound.embedding()), wanted, rtol=0, atol=1e-6)
        assert not torch.allclose(getattr(encoder, f"encode_{tower}")(rows[:1]), wanted, atol=1e-4)
