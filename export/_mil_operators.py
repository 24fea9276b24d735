"""The operators of Core ML's programs in torch, by their names and with their parameters.

Numbers are float32, or int32 for integers of any width; `_mil` rounds what an operator gives.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export import Unavailable


def _numbers(value: Any) -> list[Any]:
    return list(value.tolist()) if isinstance(value, Tensor) else [value]


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: function(_tensor(x), _tensor(y))


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Any = None, keep_dims: bool = False) -> Tensor:
        dims = list(range(x.dim())) if axes is None else _numbers(axes)
        return function(x, dim=dims, keepdim=keep_dims)

    return reduce


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _layer_norm(
    x: Tensor, axes: Any = -1, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5
) -> Tensor:
    shape = [x.shape[axis] for axis in _numbers(axes)]
    return F.layer_norm(x, shape, gamma, beta, epsilon)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Any = 1,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = 1,
    groups: int = 1,
) -> Tensor:
    stride, dilation = (_numbers(value) for value in (strides, dilations))
    if pad_type == "custom":
        # MIL pads height before width, torch the last dimension first.
        before_after = _numbers(pad)
        pairs = [before_after[i : i + 2] for i in range(0, len(before_after), 2)]
        x = F.pad(x, [value for pair in reversed(pairs) for value in pair])
    elif pad_type != "valid":
        raise Unavailable(f"no simulation of Core ML's padding {pad_type!r}")
    stride, dilation = (v * 2 if len(v) == 1 else v for v in (stride, dilation))
    return F.conv2d(x, weight, bias, tuple(stride), 0, tuple(dilation), groups)


def _slice(
    x: Tensor,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Tensor:
    rank = x.dim()
    flags = [
        _numbers(mask) if mask is not None else [False] * rank for mask in (begin_mask, end_mask)
    ]
    squeezed = _numbers(squeeze_mask) if squeeze_mask is not None else [False] * rank
    steps = _numbers(stride) if stride is not None else [1] * rank
    index: list[Any] = []
    for axis, (first, last) in enumerate(zip(_numbers(begin), _numbers(end))):
        if squeezed[axis]:
            index.append(first)
        else:
            start = None if flags[0][axis] else first
            index.append(slice(start, None if flags[1][axis] else last, steps[axis]))
    return x[tuple(index)]


def _slice_size(x: Tensor, begin: Any, size: Any) -> Tensor:
    parts = zip(_numbers(begin), _numbers(size))
    return x[tuple(slice(b, None if s == -1 else b + s) for b, s in parts)]


def _split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Any = None
) -> list[Tensor]:
    if split_sizes is not None:
        return list(x.split(_numbers(split_sizes), dim=axis))
    return list(x.chunk(int(num_splits or 1), dim=axis))


def _gather(x: Any, indices: Any, axis: int = 0, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        raise Unavailable("no simulation of Core ML's gather with batch dimensions")
    x, indices = _tensor(x), _tensor(indices)
    axis %= x.dim()
    found = x.index_select(axis, indices.reshape(-1).long())
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "") -> Tensor:
    return x.argmax(dim=axis, keepdim=keep_dims).int()


def _topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "",
) -> list[Tensor]:
    values, indices = x.topk(k, dim=axis, largest=not ascending, sorted=True)
    return [values, indices.int()]


def _one_hot(
    indices: Tensor, one_hot_vector_size: int, axis: int = -1, on_value: Any = 1, off_value: Any = 0
) -> Tensor:
    places = torch.arange(one_hot_vector_size)
    hot = indices.unsqueeze(axis) == places.view([-1] + [1] * ((-axis) - 1))
    return torch.where(hot, on_value, off_value)


def _cast(x: Any, dtype: str) -> Tensor:
    kinds = {"bool": torch.bool, "int32": torch.int32, "int16": torch.int32, "uint16": torch.int32}
    return _tensor(x).to(kinds.get(dtype, torch.float32))


def _expand(x: Any, axes: Any) -> Tensor:
    x = _tensor(x)
    for axis in sorted(a % (x.dim() + len(_numbers(axes))) for a in _numbers(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Any = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_numbers(axes)))


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Any = None,
    beta: Any = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(torch.true_divide),
    "floor_div": _binary(torch.floor_divide),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "pow": _binary(torch.pow),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "logical_not": lambda x: torch.logical_not(x),
    "identity": lambda x: x,
    "relu": lambda x: F.relu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "tanh": lambda x: torch.tanh(x),
    "erf": lambda x: torch.erf(x),
    "exp": lambda x: torch.exp(x),
    "log": lambda x, epsilon=1e-45: torch.log(x + epsilon),
    "abs": lambda x: torch.abs(x),
    "round": lambda x: torch.round(x),
    "sqrt": lambda x: torch.sqrt(x),
    "square": lambda x: x * x,
    "rsqrt": lambda x, epsilon=1e-12: torch.rsqrt(x + epsilon),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "softmax": lambda x, axis=-1: x.softmax(dim=axis),
    "gelu": _gelu,
    "silu": lambda x: F.silu(x),
    "cast": _cast,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": _matmul,
    "conv": _conv,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "reshape": lambda x, shape: x.reshape(_numbers(shape)),
    "transpose": lambda x, perm: x.permute(_numbers(perm)),
    "expand_dims": _expand,
    "squeeze": _squeeze,
    "fill": lambda shape, value=0.0: torch.full(_numbers(shape), value),
    "fill_like": lambda ref_tensor, value=0.0: torch.full(ref_tensor.shape, value),
    "tile": lambda x, reps: x.repeat(_numbers(reps)),
    "concat": lambda values, axis, interleave=False: torch.cat(list(values), dim=axis),
    "stack": lambda values, axis: torch.stack(list(values), dim=axis),
    "slice_by_index": _slice,
    "slice_by_size": _slice_size,
    "split": _split,
    "gather": _gather,
    "gather_along_axis": lambda x, indices, axis=0: x.gather(axis, indices.long()),
    "select": lambda cond, a, b: torch.where(_tensor(cond), _tensor(a), _tensor(b)),
    "one_hot": _one_hot,
    "topk": _topk,
    "reduce_argmax": _argmax,
    "reduce_sum": _reduce(torch.sum),
    "reduce_mean": _reduce(torch.mean),
    "reduce_max": _reduce(torch.amax),
    "reduce_min": _reduce(torch.amin),
    "reduce_l2_norm": _reduce(torch.linalg.vector_norm),
    "reduce_sum_square": _reduce(lambda x, dim, keepdim: (x * x).sum(dim=dim, keepdim=keepdim)),
}
