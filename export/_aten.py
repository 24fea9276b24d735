"""A tower as a graph of torch operators, with those rewritten that mobile runtimes lack.

Works on operators rather than on modules, so that towers of any library are rewritten alike.
Shapes: B batch, L tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten


def graph(module: nn.Module, example: Tensor, table: dict[Any, Callable[..., Any]]) -> Any:
    """Trace a module with static shapes and rewrite the operators in `table` -> ExportedProgram."""
    module = module.eval().requires_grad_(False)  # parts of weights become constants
    with torch.no_grad():
        return torch.export.export(module, (example,)).run_decompositions(table)


def highest(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """argmax over the last dimension of whole numbers [..., L], the first of equal ones.

    Integer arithmetic on unique keys, exact for ids times L below 2**31. Of cosines, which token
    reduction compares, it stays as it is.
    """
    if x.is_floating_point():
        return NotImplemented
    assert dim in (-1, x.dim() - 1), (dim, x.dtype)
    length = x.shape[-1]
    place = torch.arange(length, dtype=torch.int32)
    keys = x.to(torch.int32) * length + (length - 1 - place)
    first = (keys == keys.amax(dim=-1, keepdim=True)).to(torch.int32)
    return (first * place).sum(dim=-1, keepdim=keepdim).to(torch.int64)


def pick(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """gather of one place along `dim`, as a sum over all places of which all but one are 0."""
    if index.shape[dim] != 1:
        return NotImplemented
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    place = torch.arange(x.shape[dim], dtype=torch.int32).view(shape)
    chosen = (place == index.to(torch.int32)).to(x.dtype)
    return (x * chosen).sum(dim=dim, keepdim=True)


def parts(x: Tensor, dim: int = 0) -> list[Tensor]:
    """unbind as slices and reshapes."""
    shape = [size for n, size in enumerate(x.shape) if n != dim % x.dim()]
    return [x.narrow(dim, n, 1).reshape(shape) for n in range(x.shape[dim])]


def product(a: Tensor, b: Tensor) -> Tensor:
    """matmul of two stacks of matrices [..., M, K] x [..., K, N] as one bmm."""
    if a.dim() < 3 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2]:
        return NotImplemented
    found = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return found.reshape(*a.shape[:-1], b.shape[-1])


PORTABLE: dict[Any, Callable[..., Any]] = {
    aten.argmax.default: highest,
    aten.gather.default: pick,
    aten.unbind.int: parts,
    aten.matmul.default: product,
}
