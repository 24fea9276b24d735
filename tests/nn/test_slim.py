"""Cutting tensors, against slow loops over heads and layers."""

import torch

from compress.nn.slim import front_layers, leading, leading_heads, uniform_layers


def test_leading_keeps_the_first_of_each_dimension() -> None:
    x = torch.arange(24).reshape(4, 6)
    assert torch.equal(leading(x, (2, 3)), torch.tensor([[0, 1, 2], [6, 7, 8]]))


def test_leading_heads_keeps_heads_whole() -> None:
    heads, kept, head_width, width, narrow = 3, 2, 4, 5, 3
    weight = torch.randn(3 * heads * head_width, width)
    cut = leading_heads(weight, head_width, kept, narrow)
    rows = []
    for part in range(3):
        for head in range(kept):
            for k in range(head_width):
                rows.append(weight[part * heads * head_width + head * head_width + k, :narrow])
    assert torch.equal(cut, torch.stack(rows))
    assert torch.equal(leading_heads(weight[:, 0], head_width, kept, None), cut[:, 0])


def test_uniform_keeps_first_and_last() -> None:
    assert uniform_layers(12, 3) == [0, 6, 11]
    assert uniform_layers(12, 1) == [0]
    for teacher in range(2, 25):
        for student in range(2, teacher + 1):
            layers = uniform_layers(teacher, student)
            assert layers[0] == 0 and layers[-1] == teacher - 1
            assert len(set(layers)) == student and layers == sorted(layers)


def test_front_follows_tinyclip() -> None:
    assert front_layers(12, 6) == [0, 2, 4, 6, 8, 10]
    assert front_layers(12, 9) == list(range(9))
    assert front_layers(9, 6) == list(range(6))
