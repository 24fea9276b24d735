"""LiteRT bundles: every precision keeps the contract of an exporter."""

from pathlib import Path

import pytest
from tiny import tiny_clip

from export import Unavailable, _contract
from export import litert as exporter


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-static"])
def test_both_towers_keep_the_contract(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    for row in _contract.prove(tiny_clip(), "litert", precision, tmp_path / "out"):
        assert row["passed"], row["reason"]
        assert row["worst_cosine"] >= exporter.MIN_COSINE[precision]
        assert row["golden_cosine"] >= exporter.MIN_COSINE[precision]


def test_another_device_is_unavailable(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(Unavailable, match="not on gpu"):
        exporter.load(tmp_path, device="gpu")
