"""What the torch model says is computed once, and never taken for another model's."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress.clip import TorchEncoder
from export import _parity, _reference
from export._reference import Reference


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reference, "_known", {})


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call gave to the torch model."""
    counted: list[int] = []
    plain = TorchEncoder.encode_text

    def counting(self: TorchEncoder, tokens: torch.Tensor) -> torch.Tensor:
        counted.append(len(tokens))
        return plain(self, tokens)

    monkeypatch.setattr(TorchEncoder, "encode_text", counting)
    return counted


def test_no_row_is_computed_twice_and_all_come_in_order(computed: list[int]) -> None:
    clip = tiny_clip()
    tokens = torch.arange(20 * 16).reshape(20, 16) % 49
    tokens[3] = tokens[0]
    found = Reference(clip).encode_text(tokens)
    assert computed == [8, 8, 3]
    again = Reference(tiny_clip()).encode_text(tokens.flip(0))
    assert computed == [8, 8, 3], "the same weights in another object"
    assert torch.equal(again.flip(0), found)
    assert torch.allclose(found, TorchEncoder(clip).encode_text(tokens), atol=1e-6)


def test_a_weight_that_changes_in_place_makes_another_model(computed: list[int]) -> None:
    clip = tiny_clip()
    tokens = _parity.probes(clip)[1][:4]
    before = Reference(clip).encode_text(tokens)
    with torch.no_grad():
        clip.model.text.blocks[0].mlp.up.weight.mul_(-9)
    after = Reference(clip).encode_text(tokens)
    assert computed == [4, 4]
    assert not torch.allclose(before, after, atol=1e-3)


def test_another_process_goes_on_from_a_file(tmp_path: Path, computed: list[int]) -> None:
    clip = tiny_clip()
    tokens = _parity.probes(clip)[1][:4]
    _reference.load(tmp_path / "none.npz")
    found = Reference(clip).encode_text(tokens)
    _reference.save(tmp_path / "rows.npz")
    _reference._known.clear()
    _reference.load(tmp_path / "rows.npz")
    assert torch.equal(Reference(clip).encode_text(tokens), found)
    assert computed == [4]
