"""Choosing by arithmetic against TopK, ArgMax and Equal: the same tokens, also where scores tie."""

from typing import get_args

import pytest
import torch
from tiny import tiny_clip

from compress.nn import choose
from compress.schedule import Method, Reduction, Site
from compress.stages.prune_tokens import reduced

SCORES = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))


def by_sums(function, *given):
    with choose.by_arithmetic():
        return function(*given)


@pytest.mark.parametrize("num", [1, 7, 20])
def test_the_highest_are_found_by_sums(num: int) -> None:
    found = by_sums(choose.top, SCORES, num)
    assert found.dtype == torch.float32
    assert torch.equal(found.long(), choose.top(SCORES, num))


def test_scores_that_differ_in_the_last_bit_are_told_apart() -> None:
    scores = torch.full((1, 4), 0.5)
    scores[0, 2] = torch.nextafter(scores[0, 2], torch.tensor(1.0))
    assert by_sums(choose.top, scores, 1).item() == 2


def test_the_first_of_equal_scores_comes_first() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]])
    assert by_sums(choose.top, scores, 5).tolist() == [[1, 2, 4, 0, 3]]
    value, index = by_sums(choose.highest, scores)
    assert (value.item(), index.item()) == (2, 1)


def test_rows_of_three_dimensions_have_their_highest() -> None:
    scores = SCORES.reshape(3, 4, 5)
    assert torch.equal(by_sums(choose.argmax, scores).long(), scores.argmax(dim=-1))


def test_indices_are_put_in_order_and_looked_up() -> None:
    indices = torch.tensor([[7, 2, 9, 0]])
    assert by_sums(choose.ascending, indices.float()).tolist() == [[0, 2, 7, 9]]
    hot = torch.eye(4)[[3, 1]].unsqueeze(0)
    assert by_sums(choose.looked_up, hot, indices.float()).tolist() == [[0, 2]]
    assert choose.looked_up(hot, indices).tolist() == [[0, 2]]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("num", [6, 7])
def test_two_sets_of_places_become_one(first: int, num: int) -> None:
    places = torch.arange(num).unsqueeze(0)
    parts = places[:, first::2], places[:, 1 - first :: 2]
    assert torch.equal(choose.interleaved(*parts, first), places)
    floats = [part.float() for part in parts]
    assert torch.equal(by_sums(choose.interleaved, *floats, first).long(), places)
    rows = torch.randn(1, num, 3)
    assert torch.equal(by_sums(choose.every, rows, first, 2), rows[:, first::2])


def test_what_is_chosen_outside_stays_as_it_was() -> None:
    by_sums(choose.top, SCORES, 2)
    assert choose.top(SCORES, 2).dtype == torch.int64


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_merges_the_same_tokens_by_sums(method: Method) -> None:
    torch.manual_seed(0)
    sites = (Site(layer=0, keep=12), Site(layer=1, keep=8))
    clip = reduced(tiny_clip(layers=3), Reduction(method=method, sites=sites))
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted = clip.model.encode_image(pixels)
        found = by_sums(clip.model.encode_image, pixels)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
