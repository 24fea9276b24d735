"""The choices that token reduction makes: highest scores, equal places, the most similar.

By TopK, ArgMax and Equal; inside `by_arithmetic()` by sums, products and roundings alone, for
runtimes that have none of the three. Indices are floats there.

Shapes: B batch, P places, K chosen; "..." any.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

_arithmetic: ContextVar[bool] = ContextVar("arithmetic", default=False)


@contextmanager
def by_arithmetic() -> Iterator[None]:
    """Choose without TopK, ArgMax or comparison, by P * P differences: what is traced inside gives
    the same tokens, the first of equal scores first."""
    token = _arithmetic.set(True)
    try:
        yield
    finally:
        _arithmetic.reset(token)


def top(scores: Tensor, num: int) -> Tensor:
    """Indices of the `num` highest scores [B, P], the highest first -> [B, num]."""
    if not _arithmetic.get():
        return scores.topk(num, dim=-1).indices
    return _weighed(_at_ranks(scores, num), _places(scores))


def ascending(indices: Tensor) -> Tensor:
    """Rows of indices [B, K], which differ, in ascending order."""
    falling = -indices.to(torch.float32)
    if not _arithmetic.get():
        # By places: TopK of which nobody takes the indices is a sort to LiteRT, which has none.
        order = falling.topk(indices.shape[1], dim=-1).indices.unsqueeze(-1)
        found = _weighed(
            same(order, torch.arange(indices.shape[1], device=order.device)), indices.unsqueeze(-2)
        )
        return found.round().to(indices.dtype)
    return _weighed(_at_ranks(falling, indices.shape[1]), indices.unsqueeze(-2))


def highest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of each row [..., P] and its index, both [...]."""
    if not _arithmetic.get():
        values, indices = scores.max(dim=-1)
        return values, indices
    value = scores.amax(dim=-1, keepdim=True)
    equal = 1 - _positive(value - scores)  # [..., P]
    num = scores.shape[-1]
    before = equal @ torch.ones(num, num, device=scores.device).triu(1)
    return value.squeeze(-1), _weighed(equal * F.relu(1 - before), _places(scores))


def argmax(scores: Tensor) -> Tensor:
    """The index of the highest of each row: [..., P] -> [...]."""
    return highest(scores)[1] if _arithmetic.get() else scores.argmax(dim=-1)


def same(a: Tensor, b: Tensor) -> Tensor:
    """1 where two indices are equal, else 0: any shapes that broadcast -> float32."""
    if not _arithmetic.get():
        return (a == b).to(torch.float32)
    return F.relu(1 - (a.to(torch.float32) - b.to(torch.float32)).abs())


def identity(num: int, device: torch.device) -> Tensor:
    """Ones on the diagonal [P, P]; of torch.eye LiteRT makes an operator that it cannot run."""
    places = torch.arange(num, device=device)
    return same(places.unsqueeze(-1), places)


def fixed(indices: Sequence[int], device: torch.device) -> Tensor:
    """Indices that are known beforehand: [K]."""
    kind = torch.float32 if _arithmetic.get() else torch.int64
    return torch.tensor(list(indices), dtype=kind, device=device)


def looked_up(hot: Tensor, indices: Tensor) -> Tensor:
    """What stands where rows have their single 1: hot [B, P, K], indices [B, K] -> [B, P]."""
    if _arithmetic.get():
        return _weighed(hot, indices.unsqueeze(-2))
    # Indices travel as floats: exact up to 2^24, and MatMul takes no integers.
    found = (hot @ indices.to(hot.dtype).unsqueeze(-1)).squeeze(-1)
    return found.round().to(indices.dtype)


def every(x: Tensor, first: int, step: int) -> Tensor:
    """Every so many row from `first` on: x [B, N, C] -> fewer rows."""
    if not _arithmetic.get():
        return x[:, first::step]
    return torch.eye(x.shape[1], device=x.device)[first::step] @ x


def interleaved(odd: Tensor, even: Tensor, first: int) -> Tensor:
    """Indices [B, A] and [B, T] in turns, [B, A + T]: `odd` hold the places first, first + 2..."""
    if _arithmetic.get():
        spread = torch.eye(odd.shape[1] + even.shape[1], device=odd.device)
        parts = (odd @ spread[first::2], even.to(odd.dtype) @ spread[1 - first :: 2])
        return parts[0] + parts[1]
    left, right = (even, odd) if first else (odd, even)
    pairs = min(left.shape[1], right.shape[1])
    both = torch.stack([left[:, :pairs], right[:, :pairs]], dim=2).flatten(1)
    return torch.cat([both, left[:, pairs:]], dim=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of rows [..., C] that broadcast -> [...]."""
    if not _arithmetic.get():
        return F.cosine_similarity(a, b, dim=-1)
    return (unit_length(a) * unit_length(b)).sum(dim=-1)


def unit_length(x: Tensor) -> Tensor:
    """Rows [..., C] over their length."""
    if not _arithmetic.get():
        return F.normalize(x, dim=-1)
    return x / x.square().sum(dim=-1, keepdim=True).clamp(min=1e-24).sqrt()


def positive(x: Tensor) -> Tensor:
    """1 where x is above 0, else 0."""
    return _positive(x) if _arithmetic.get() else (x > 0).to(x.dtype)


def _at_ranks(scores: Tensor, num: int) -> Tensor:
    """scores [B, P] -> [B, num, P]: row k has a single 1, at the score that k others exceed."""
    size = scores.shape[-1]
    ahead = scores.unsqueeze(-2) - scores.unsqueeze(-1)  # [B, P, P], column over row
    over, under = _positive(ahead), _positive(-ahead)
    earlier = torch.ones(size, size, device=scores.device).tril(-1)
    rank = (over + (1 - over - under) * earlier).sum(dim=-1)  # [B, P]
    return same(rank.unsqueeze(-2), torch.arange(num, device=scores.device).unsqueeze(-1))


def _positive(x: Tensor) -> Tensor:
    return x.clamp(0, 1).ceil()


def _places(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-1], dtype=torch.float32, device=scores.device)


def _weighed(hot: Tensor, numbers: Tensor) -> Tensor:
    """Rows with a single 1 [..., P] -> the number that stands there [...]; numbers broadcast."""
    return (hot * numbers).sum(dim=-1)
