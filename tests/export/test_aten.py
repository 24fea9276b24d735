"""Rewritten operators against torch's own, on awkward inputs."""

import pytest
import torch

from export import _aten


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_highest_is_the_first_of_equal_ids(dtype: torch.dtype) -> None:
    tokens = torch.randint(0, 49408, (40, 77)).to(dtype)
    tokens[:20, 30] = tokens[:20, 70] = 49407
    tokens[5] = 3
    found = _aten.highest(tokens, -1)
    assert torch.equal(found, tokens.argmax(dim=-1)) and found[5] == 0
    assert torch.equal(_aten.highest(tokens, 1, True), tokens.argmax(1, keepdim=True))


def test_pick_equals_gather_and_leaves_many_places_alone() -> None:
    x = torch.randn(3, 7, 4)
    index = torch.tensor([6, 0, 3]).view(3, 1, 1).expand(-1, 1, 4)
    assert torch.equal(_aten.pick(x, 1, index), x.gather(1, index))
    assert _aten.pick(x, 1, torch.zeros(3, 2, 4, dtype=torch.int64)) is NotImplemented


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_parts_equal_unbind(dim: int) -> None:
    x = torch.randn(3, 4, 5)
    assert all(torch.equal(a, b) for a, b in zip(_aten.parts(x, dim), x.unbind(dim)))


def test_product_equals_matmul() -> None:
    a, b = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(_aten.product(a, b), a @ b)
    assert _aten.product(a, b[0, 0]) is NotImplemented


def test_a_traced_tower_computes_the_same_without_the_operators() -> None:
    class Tower(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = tokens.float()[:, :, None] * torch.arange(1.0, 5)
            q, k = torch.stack([x, x + 1]).unbind(0)
            mixed = (q @ k.transpose(1, 2)) @ k
            end = tokens.argmax(dim=-1).view(-1, 1, 1).expand(-1, 1, 4)
            return mixed.gather(1, end).squeeze(1)

    tokens = torch.randint(0, 300, (1, 9), dtype=torch.int32)
    program = _aten.graph(Tower(), tokens, _aten.PORTABLE)
    torch.testing.assert_close(program.module()(tokens), Tower()(tokens))
    used = {str(node.target) for node in program.graph.nodes}
    assert not used & {"aten.argmax.default", "aten.gather.default", "aten.unbind.int"}


def test_the_highest_of_cosines_is_left_to_the_runtime() -> None:
    """Token reduction compares floats, for which there are no unique whole keys."""
    assert _aten.highest(torch.randn(2, 5), -1) is NotImplemented
    program = _aten.graph(Nearest(), torch.randn(1, 4, 3), _aten.PORTABLE)
    x = torch.randn(1, 4, 3)
    assert torch.equal(program.module()(x), Nearest()(x))


class Nearest(torch.nn.Module):
    """The token that each token resembles most."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.transpose(1, 2)).argmax(dim=-1)
