"""Fixtures for exporters."""

from collections.abc import Iterator

import onnx
import pytest

from compress.clip import Clip
from export import _reference
from export import onnx as portable


@pytest.fixture(scope="session")
def traced() -> dict[tuple[str, str, int, int], onnx.ModelProto]:
    """Graphs that tests of any exporter have asked for."""
    return {}


@pytest.fixture(scope="module")
def trace_once(traced: dict[tuple[str, str, int, int], onnx.ModelProto]) -> Iterator[None]:
    """Torch needs seconds to trace a tower; equal models are traced once for all tests."""
    trace = portable.graph

    def graph(clip: Clip, tower: str, batch: int, opset: int) -> onnx.ModelProto:
        key = (_reference.embedding_space(clip), tower, batch, opset)
        if key not in traced:
            traced[key] = trace(clip, tower, batch, opset)
        copy = onnx.ModelProto()
        copy.CopyFrom(traced[key])
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "graph", graph)
        yield
